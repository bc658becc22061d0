"""Method `speech_encoder`: pipeline 1 of paper 002, a transformers speech encoder fine-tuned.

Any that transformers can load does: Wav2Vec2, HuBERT and WavLM read samples, Whisper's encoder a
spectrum. Where the paper is silent:

- Everything learns, the convolutions under the transformer too.
- SpecAugment and layer drop, which the configurations of many such encoders turn on for
  training, are off: the first refuses short clips, and after the second some parameters of a step
  have no gradient.
- Encoders without an attention mask, wav2vec2-base-960h among them, cannot tell padding from
  silence. In training the clips of a step are padded to its longest, as these encoders were
  trained; dev and predictions hear every clip by itself, so that no other row decides what is said
  of it.

A run keeps all that it needs in `adapter/` (`pretrained`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AutoFeatureExtractor, PreTrainedConfig, PreTrainedModel

from llm_emo.baselines import audio, fusion, pretrained, sounds
from llm_emo.baselines.classifier import Classifier, Encoding, Item
from llm_emo.baselines.kinds import SpeechEncoder
from llm_emo.errors import ModelError
from llm_emo.types import Row, Split

if TYPE_CHECKING:
    from llm_emo.experiment import BaselineExperiment


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
        pretrained.save(folder, self.model, self.extractor)

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
    encoder, extractor = pretrained.load(SOUND, method.name, method.revision)
    _require_sound(method.name, encoder, extractor)
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
    model, extractor = pretrained.read(
        SOUND, folder, lambda base: fusion.AudioClassifier(base, len(names), method.head.dropout)
    )
    return SpeechEncoderClassifier(names, method, model, extractor)


def _learns_whole(name: str, config: PreTrainedConfig) -> None:
    """Turn off what would hide parts of a clip, or of the encoder, from a step."""
    for key, off in (("apply_spec_augment", False), ("layerdrop", 0.0), ("encoder_layerdrop", 0.0)):
        if hasattr(config, key):
            setattr(config, key, off)


SOUND = pretrained.Kind(
    what="a speech encoder",
    names="a local speech encoder",
    front=AutoFeatureExtractor,
    spare="masked_spec_embed",  # SpecAugment's
    settle=_learns_whole,
)


def _require_sound(name: str, model: PreTrainedModel, extractor: Any) -> None:
    """Hold that a model reads the program's sound, and says how many frames it makes of it.

    Raises:
        ModelError: it does neither.
    """
    heard = getattr(extractor, "sampling_rate", None)
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    if heard != audio.SAMPLE_RATE or not hasattr(encoder, "_get_feat_extract_output_lengths"):
        raise ModelError(
            f"{name}: {type(model).__name__} reads no sound of {audio.SAMPLE_RATE:,} samples a "
            "second; take Wav2Vec2, HuBERT, WavLM or Whisper"
        )
