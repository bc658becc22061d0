"""Method `fusion`: pipeline 3 of paper 002 over what finished runs say of a row.

Any run does whose method gives features: `encoder` and `text_cnn` read, `ilt`, `cat` and
`speech_encoder` hear. They are frozen, and what they say of a row is computed once and kept in the
cache. Their rows must be parted as this one's are; a limit on them may differ.

A run keeps in `adapter/` the weights of its four layers, and in `text/` and `audio/` what the runs
below it had learned, so it needs them no more.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_emo import runs
from llm_emo.baselines import nested
from llm_emo.baselines.classifier import Classifier, Item, lent_gpu
from llm_emo.baselines.fusion import Fusion, join
from llm_emo.baselines.kinds import Fusion as FusionMethod
from llm_emo.baselines.storage import load_weights, save_weights
from llm_emo.errors import ModelError, RecipeError
from llm_emo.types import Row, Split

if TYPE_CHECKING:
    from llm_emo.experiment import BaselineExperiment

WEIGHTS, SIZES = "fusion.safetensors", "sizes.json"
TEXT, AUDIO = "text", "audio"


class FusionClassifier(Classifier):
    """Four layers over frozen classifiers; an item is what those say of a row, shape (D,).

    Args:
        names: C classes.
        model: the layers.
        below: the runs that it listens to, frozen, by the folder that each is kept in.
    """

    model: Fusion

    def __init__(
        self,
        names: Sequence[str],
        method: FusionMethod,
        model: Fusion,
        below: Mapping[str, nested.Nested],
    ) -> None:
        super().__init__(names, model)
        self.method, self.below = method, dict(below)

    def items(self, rows: Sequence[Row], split: Split, *, augmented: bool) -> list[Item]:
        """Return one item a row; nothing is augmented."""
        if not rows:
            return []
        whole = _said(self.below.values(), rows, split)
        return [
            Item(own, (self.names.index(row.gold),), (row.utterance.uid,))
            for own, row in zip(whole, rows, strict=True)
        ]

    def batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return `x`, shape (B, D)."""
        return {"x": torch.stack([item.inputs for item in items])}

    def scores(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return class scores, shape (B, C)."""
        scores: Tensor = model(batch["x"])
        return scores

    def save(self, folder: Path) -> None:
        """Write the layers, and what the runs below had learned."""
        save_weights(folder / WEIGHTS, self.model)
        runs.write_json(folder / SIZES, {"inputs": self.model.inputs})
        for name, run in self.below.items():
            nested.keep(run, folder / name)

    def facts(self) -> dict[str, Any]:
        """Return the runs below and the size of what they say of a row."""
        return {
            "inputs": self.model.inputs,
            "below": {
                name: {
                    "run": self.method.below[name],
                    "parameters": sum(p.numel() for p in run.classifier.model.parameters()),
                }
                for name, run in self.below.items()
            },
        }


def create(method: FusionMethod, experiment: "BaselineExperiment") -> FusionClassifier:
    """Return random layers over the runs that the recipe names.

    Raises:
        RunError: there is no such run, it is not finished, or it parts other rows.
        RecipeError: a run that should read hears, or the other way round.
        ModelError: a run is damaged, or gives no features.
    """
    from llm_emo.baselines import opening  # it imports this module's neighbours as they are asked

    below = {}
    for name, run in method.below.items():
        opened = opening.open_run(run, experiment)
        kind = opened.experiment.recipe.method
        if kind.hears != (name == AUDIO):
            does, wanted = ("hears", "reads") if kind.hears else ("reads", "hears")
            raise RecipeError(
                f"'method.{name}_run': {run} is a run of method {kind.kind}, which {does}; "
                f"expected one that {wanted}"
            )
        below[name] = nested.Nested(opened.run.adapter, kind, opened.classifier, opened.learned)
    inputs = _said(below.values(), experiment.rows("train"), "train").shape[1]
    names = experiment.labels.names
    return FusionClassifier(names, method, Fusion(method.network, inputs, len(names)), below)


def load(method: FusionMethod, experiment: "BaselineExperiment", folder: Path) -> FusionClassifier:
    """Return what `FusionClassifier.save` wrote into `folder`.

    Raises:
        ModelError: a file is absent, damaged, or of other settings.
    """
    path = folder / SIZES
    try:
        inputs = int(json.loads(path.read_text("utf-8"))["inputs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); the run is damaged") from error
    below = {name: nested.read(folder / name, experiment) for name in method.below}
    names = experiment.labels.names
    with torch.random.fork_rng(devices=[]):  # drawn only to be read over
        model = Fusion(method.network, inputs, len(names))
    load_weights(folder / WEIGHTS, model)
    return FusionClassifier(names, method, model.eval(), below)


def _said(below: Iterable[nested.Nested], rows: Sequence[Row], split: Split) -> Tensor:
    """Return features and probabilities of all classifiers beside each other, shape (N, D)."""
    encodings = []
    for classifier in (run.classifier for run in below):
        with lent_gpu(classifier.model):
            encodings.append(classifier.encode(rows, split))
    return join(encodings)
