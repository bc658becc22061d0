"""Method `speech_encoder`: pipeline 1 of paper 002, a transformers speech encoder fine-tuned.

Any that transformers can load does: Wav2Vec2, HuBERT and WavLM read samples, Whisper's encoder a
spectrum. Where the paper is silent:

- Everything learns, the convolutions under the transformer too.
- SpecAugment and layer drop, which the configurations of Wav2Vec2 and its kin turn on for
  training, are off: the first refuses short clips, and after the second some parameters of a step
  have no gradient.
- Encoders without an attention mask, wav2vec2-base-960h among them, cannot tell padding from
  silence. In training the clips of a step are padded to its longest, as these encoders were
  trained; dev and predictions hear every clip by itself, so that no other row decides what is said
  of it.

A run keeps in `adapter/` config.json and preprocessor_config.json as transformers writes them, and
the weights of encoder and head. Nothing is asked of the place that the encoder once came from.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, PreTrainedModel
from transformers.utils import logging

from llm_emo.baselines import audio, fusion, sounds
from llm_emo.baselines.classifier import Classifier, Encoding, Item
from llm_emo.baselines.kinds import SpeechEncoder
from llm_emo.baselines.storage import load_weights, save_weights
from llm_emo.errors import JobFailed, ModelError
from llm_emo.machine import writing
from llm_emo.types import Row, Split

if TYPE_CHECKING:
    from llm_emo.experiment import BaselineExperiment

WEIGHTS = "classifier.safetensors"

UNUSED = ("masked_spec_embed",)
"""What a checkpoint may lack: it is SpecAugment's."""


class SpeechEncoderClassifier(Classifier):
    """A speech encoder with its head and its feature extractor; an item is a clip's samples.

    Args:
        names: C classes.
        method: length of a clip.
        model: encoder and head.
        extractor: the encoder's own.
    """

    model: fusion.AudioClassifier

    def __init__(
        self,
        names: Sequence[str],
        method: SpeechEncoder,
        model: fusion.AudioClassifier,
        extractor: Any,
    ) -> None:
        super().__init__(names, model)
        self.method, self.extractor = method, extractor
        self._heard: dict[str, dict[str, float]] = {}
        if not fusion.knows_padding(extractor):
            self.items_per_pass = 1

    def items(self, rows: Sequence[Row], split: Split, *, augmented: bool) -> list[Item]:
        """Return one item a clip; nothing is augmented.

        Raises:
            DatasetError: a clip's file is absent or no sound.
        """
        made, cut, longest = [], 0, self.method.head.max_samples
        for row in rows:
            whole = audio.decode(sounds.path_of(row))
            cut += len(whole) > longest
            label = self.names.index(row.gold)
            made.append(Item(whole[:longest].copy(), (label,), (row.utterance.uid,)))
        samples = sum(len(item.inputs) for item in made)
        seconds = round(samples / audio.SAMPLE_RATE, 1)
        self._heard[split] = {"clips": len(rows), "cut": cut, "seconds": seconds}
        return made

    def batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return `values`, `steps` and where the encoder knows one `attention_mask`."""
        clips = [item.inputs for item in items]
        return fusion.audio_inputs(self.extractor, clips, self.method.head.max_samples)

    def scores(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return class scores, shape (B, C)."""
        scores: Tensor = model(**batch)
        return scores

    def save(self, folder: Path) -> None:
        """Write config, feature extractor and weights."""
        with writing(folder, "make room, or name another folder"):
            self.model.encoder.config.save_pretrained(folder)
            self.extractor.save_pretrained(folder)
        save_weights(folder / WEIGHTS, self.model)

    def facts(self) -> dict[str, Any]:
        """Return the encoder, its parameters without the head, and the clips that were heard."""
        return {
            "encoder": self.method.name,
            "revision": self.method.revision,
            "encoder_parameters": sum(p.numel() for p in self.model.encoder.parameters()),
            "heard": {split: dict(counts) for split, counts in self._heard.items()},
        }

    def encode(self, rows: Sequence[Row], split: Split) -> Encoding:
        """Return the mean of the encoder's frames (N, H), and class probabilities (N, C)."""
        files = sounds.paths_of(rows)
        return fusion.encode_sounds(self.model, self.extractor, files, self.method.head.max_samples)


def create(method: SpeechEncoder, experiment: "BaselineExperiment") -> SpeechEncoderClassifier:
    """Return a classifier over a pre-trained encoder; its head is random.

    Raises:
        ModelError: the encoder cannot be used.
        JobFailed: the hub cannot be reached.
    """
    names = experiment.labels.names
    encoder, extractor = _pretrained(method.name, method.revision)
    model = fusion.AudioClassifier(encoder, len(names), method.head.dropout)
    return SpeechEncoderClassifier(names, method, model, extractor)


def load(
    method: SpeechEncoder, experiment: "BaselineExperiment", folder: Path
) -> SpeechEncoderClassifier:
    """Return what `SpeechEncoderClassifier.save` wrote into `folder`.

    Raises:
        ModelError: a file is absent, damaged, or belongs to other settings.
    """
    names = experiment.labels.names
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        extractor = AutoFeatureExtractor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:400]
        raise ModelError(f"{folder}: its encoder cannot be read: {text}") from error
    with torch.random.fork_rng(devices=[]):  # drawn only to be read over
        encoder = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model = fusion.AudioClassifier(encoder, len(names), method.head.dropout)
    load_weights(folder / WEIGHTS, model)
    return SpeechEncoderClassifier(names, method, model.eval(), extractor)


def _pretrained(name: str, revision: str | None) -> tuple[PreTrainedModel, Any]:
    """Return a speech model of transformers and its feature extractor."""
    if revision is None and not (Path(name) / "config.json").is_file():
        raise ModelError(
            f"{name!r} is no folder with a config.json; name a local speech encoder, or a Hugging "
            "Face id with its revision"
        )
    where: dict[str, Any] = {"trust_remote_code": False}
    where |= {"local_files_only": True} if revision is None else {"revision": revision}
    if not sys.stderr.isatty():  # in a log file a bar is noise
        logging.disable_progress_bar()
    try:
        extractor = AutoFeatureExtractor.from_pretrained(name, **where)
        config = AutoConfig.from_pretrained(name, **where)
        for key, off in (("apply_spec_augment", False), ("layerdrop", 0.0)):
            if hasattr(config, key):
                setattr(config, key, off)
        # A pickled checkpoint is code.
        model, info = AutoModel.from_pretrained(
            name, config=config, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True, **where,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())[:400]
        if revision is not None and ("connect" in text or "offline" in text):
            raise JobFailed(
                f"{name}: the Hugging Face hub cannot be reached; download the encoder elsewhere "
                "and name its folder"
            ) from error
        raise ModelError(f"{name}: cannot be loaded as a speech encoder: {text}") from error
    missing = [key for key in info["missing_keys"] if not key.endswith(UNUSED)]
    if missing:  # transformers fills them with random numbers and goes on
        raise ModelError(
            f"{name}: its checkpoint lacks {len(missing)} of the encoder's tensors, such as "
            f"{min(missing)}; is it complete, and a speech encoder?"
        )
    heard = getattr(extractor, "sampling_rate", None)
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    if heard != audio.SAMPLE_RATE or not hasattr(encoder, "_get_feat_extract_output_lengths"):
        raise ModelError(
            f"{name}: {type(model).__name__} reads no sound of {audio.SAMPLE_RATE:,} samples a "
            "second; take Wav2Vec2, HuBERT, WavLM or Whisper"
        )
    return model, extractor
