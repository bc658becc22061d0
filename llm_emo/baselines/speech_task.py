"""Methods `ilt` and `cat`: the networks of paper 004, from sound files to class scores.

An item is a clip's log-mels. Training and its validation hear every clip as it is and in noisy
copies (`Noise`), each of which is an item with the clip's label and uid; predictions hear clips as
they are. Mel bands are standardised by the training clips, copies included.

A run keeps in `adapter/` the weights with their statistics, and in `learned.json` the fusion
weights that ILT ended with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_emo import runs
from llm_emo.baselines import audio, features, sounds
from llm_emo.baselines.cat import Cat
from llm_emo.baselines.classifier import Classifier, Encoding, Item
from llm_emo.baselines.ilt import Ilt
from llm_emo.baselines.kinds import Cat as CatMethod
from llm_emo.baselines.kinds import Ilt as IltMethod
from llm_emo.baselines.storage import load_weights, save_weights
from llm_emo.errors import RecipeError
from llm_emo.types import Row, Split

if TYPE_CHECKING:
    from llm_emo.experiment import BaselineExperiment

Method = IltMethod | CatMethod

WEIGHTS, LEARNED = "network.safetensors", "learned.json"

CLIPS_PER_PASS = 64
"""Of the pass that features come from."""


class SpeechClassifier(Classifier):
    """One of paper 004's networks; an item is a clip's log-mels, shape (T, M).

    Args:
        names: C classes.
        method: sizes and noise.
        model: of these sizes.
        seed: of the noise.
    """

    model: Ilt | Cat

    def __init__(self, names: Sequence[str], method: Method, model: Ilt | Cat, seed: int) -> None:
        super().__init__(names, model)
        self.method, self.seed = method, seed
        # Standardisation hears the training clips before training does.
        self._clips: dict[tuple[str, bool], list[Tensor]] = {}
        self._heard: dict[str, dict[str, float]] = {}

    def items(self, rows: Sequence[Row], split: Split, *, augmented: bool) -> list[Item]:
        """Return one item a clip, and after it its noisy copies where `augmented`.

        Raises:
            DatasetError: a clip's file is absent or no sound.
        """
        made = [
            Item(clip, (self.names.index(row.gold),), (row.utterance.uid,))
            for row in rows
            for clip in self._variants(row, split, augmented=augmented)
        ]
        frames = [len(item.inputs) for item in made]
        self._heard[split] = {
            "clips": len(rows),
            "items": len(made),
            "seconds": round(sum(frames) * audio.HOP / audio.SAMPLE_RATE, 1),
            "as_long_as_can_be": sum(count == audio.FRAMES for count in frames),
        }
        return made

    def _variants(self, row: Row, split: Split, *, augmented: bool) -> list[Tensor]:
        path = sounds.path_of(row)
        key = (str(path), augmented and split != "test")
        if key not in self._clips:
            heard = [audio.decode(path)]
            if augmented:
                heard = audio.variants(
                    heard[0], row.utterance.uid, split, self.method.noise, self.seed
                )
            self._clips[key] = [audio.log_mel(waveform) for waveform in heard]
        return self._clips[key]

    def batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return `features`, shape (B, T, M), and `lengths`, shape (B,).

        T is 7.5 s where padding is read as silence, else the longest clip's.
        """
        to = None if self.method.network.mask else audio.FRAMES
        padded, lengths = audio.pad([item.inputs for item in items], to)
        return {"features": padded, "lengths": lengths}

    def scores(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return class scores, shape (B, C)."""
        scores: Tensor = model(batch["features"], batch["lengths"])
        return scores

    def save(self, folder: Path) -> None:
        """Write the weights with their statistics, and what can be read off them."""
        save_weights(folder / WEIGHTS, self.model)
        runs.write_json(folder / LEARNED, self.learned())

    def learned(self) -> dict[str, Any]:
        """Return the shares of LSTM and transformer, where a sum of both is what is classified."""
        shares = self.model.fusion_weights() if isinstance(self.model, Ilt) else None
        if shares is None:
            return {}
        return {"fusion_weights": {"lstm": shares[0], "transformer": shares[1]}}

    def facts(self) -> dict[str, Any]:
        """Return the structure, and the clips of each split that was heard."""
        return {
            "structure": self.method.network.structure,
            "heard": {split: dict(counts) for split, counts in self._heard.items()},
        }

    def encode(self, rows: Sequence[Row], split: Split) -> Encoding:
        """Return what the last layer reads (N, D), and class probabilities (N, C), of clean clips.

        They are computed once and kept in the cache.
        """

        def key() -> features.Key:
            return {
                "kind": f"{self.method.kind} {self.method.network.model_dump_json()}",
                "weights": features.fingerprint(self.model),
                "files": sounds.digest(sounds.path_of(row) for row in rows),
            }

        uids = [row.utterance.uid for row in rows]
        kept = torch.tensor(features.cached(key, uids, lambda: self._extract(rows, split)))
        width = self.model.classify.in_features
        return Encoding(kept[:, :width], kept[:, width:])

    def _extract(self, rows: Sequence[Row], split: Split) -> features.Floats:
        """Return features and probabilities beside each other, shape (N, D + C)."""
        self.model.eval()
        device = self.model.classify.weight.device
        items = self.items(rows, split, augmented=False)
        found = []
        with torch.inference_mode():
            for start in range(0, len(items), CLIPS_PER_PASS):
                batch = self.batch(items[start : start + CLIPS_PER_PASS])
                own = self.model.encode(*(batch[name].to(device) for name in batch))
                found.append(torch.cat((own, self.model.classify(own).softmax(1)), 1).cpu())
        whole: features.Floats = torch.cat(found).numpy()
        return whole


def create(method: Method, experiment: "BaselineExperiment") -> SpeechClassifier:
    """Return a random network, standardised by the training clips and their noisy copies.

    Raises:
        RecipeError: its sizes do not fit together.
        DatasetError: a clip's file is absent or no sound.
    """
    made = _new(method, experiment)
    items = made.items(experiment.rows("train"), "train", augmented=True)
    made.model.standardise.fit([item.inputs for item in items])
    return made


def load(method: Method, experiment: "BaselineExperiment", folder: Path) -> SpeechClassifier:
    """Return what `SpeechClassifier.save` wrote into `folder`.

    Raises:
        ModelError: the weights are absent, damaged, or of other settings.
    """
    with torch.random.fork_rng(devices=[]):  # drawn only to be read over
        made = _new(method, experiment)
    load_weights(folder / WEIGHTS, made.model)
    made.model.eval()
    return made


def _new(method: Method, experiment: "BaselineExperiment") -> SpeechClassifier:
    names = experiment.labels.names
    try:
        network = (
            Ilt(method.network, len(names))
            if isinstance(method, IltMethod)
            else Cat(method.network, len(names))
        )
    except ValueError as error:
        raise RecipeError(f"'method.network': {error}") from None
    return SpeechClassifier(names, method, network, experiment.recipe.seed)
