"""Text and speech in one: two fine-tuned encoders, frozen, under a small network that learns.

Paper: Petec and Popoviciu, "Multimodal Speech Emotion Recognition using Decoding-enhanced BERT
with Disentangled Attention and Wav2Vec2.0", section III and figure 4. It has no equations but
cross-entropy and AdamW.

    pipeline 1: sound (16 kHz) -> encoder -> mean over frames -> linear -> scores   AudioClassifier
    pipeline 2: words          -> encoder -> mean over tokens -> linear -> scores   MeanClassifier
    pipeline 3: [text features; text scores; audio features; audio scores] -> MLP   Fusion

Pipeline 2 is `encoder.MeanClassifier`: method `encoder` with `pooling: mean`. The reference
encoders are deberta-v3-small and wav2vec2-base-960h; any encoder of transformers does. Pipelines 1
and 2 are trained first. What they say of a row (`Encoding`) never changes afterwards, so it is
computed once, and pipeline 3 learns from it alone: the encoders are frozen because they are not
there.

Where the paper is silent:

- Features are the mean of the encoder's last states over a row's valid tokens or frames. Flattening
  all of them, which figure 4 may mean, would need every row padded to one length, and would let
  the network read how long a clip is out of its padding.
- Scores are probabilities: logits of two encoders that were trained apart have no common scale.
  All three have the protocol's classes; the paper's text model has nine, its others six.
- In the shipped recipes the four layers have 512, 256, 128 and k units. ReLU and dropout stand
  between them.

Letters: B rows, T tokens or frames, H hidden units, k classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_emo.baselines import sounds
from llm_emo.baselines.acoustic import mean_over_time
from llm_emo.baselines.audio import SAMPLE_RATE, WINDOW, Waveform, decode
from llm_emo.baselines.classifier import Encoding
from llm_emo.baselines.features import Key, cached, fingerprint
from llm_emo.baselines.speech_settings import FusionSettings


class AudioClassifier(nn.Module):
    """Pipeline 1: any speech encoder, the mean over its valid frames, one linear layer.

    Encoders that read samples (Wav2Vec2, HuBERT, WavLM) and such that read spectra of fixed
    length (Whisper, of which the encoder is taken) both do.
    """

    def __init__(self, model: PreTrainedModel, classes: int, dropout: float) -> None:
        super().__init__()
        self.encoder = model.get_encoder() if model.config.is_encoder_decoder else model
        # Wav2Vec2's vector for masked frames: nothing is masked here, so it gets no gradient, for
        # which processes would wait.
        if (unused := getattr(self.encoder, "masked_spec_embed", None)) is not None:
            unused.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(model.config.hidden_size, classes)

    def features(
        self, values: Tensor, steps: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Map sound to features (B, H).

        Args:
            values: samples (B, N) or spectra (B, M, T).
            steps: how many samples, or columns of the spectrum, each row has.
            attention_mask: as the feature extractor gives it; None where the encoder was
                trained without one.
        """
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        states = self.encoder(values, **mask).last_hidden_state  # (B, T, H)
        frames = self.encoder._get_feat_extract_output_lengths(steps)
        return mean_over_time(states, frames.clamp(1, states.shape[1]))

    def forward(
        self, values: Tensor, steps: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Map sound, as `features` takes it, to logits (B, k)."""
        logits: Tensor = self.classify(self.dropout(self.features(values, steps, attention_mask)))
        return logits


def is_spectral(extractor: Any) -> bool:
    """Whether an encoder reads spectra of one length for all clips, instead of samples."""
    return bool(extractor.model_input_names[0] == "input_features")


def knows_padding(extractor: Any) -> bool:
    """Whether an encoder can tell the padding of a batch from silence, or has none."""
    return is_spectral(extractor) or bool(extractor.return_attention_mask)


def audio_inputs(
    extractor: Any, waveforms: Sequence[Waveform], max_samples: int
) -> dict[str, Tensor]:
    """Return what `AudioClassifier` takes; longer clips lose their end.

    `extractor` is the encoder's own feature extractor. It decides whether samples or a spectrum
    are read, and whether there is an attention mask.
    """
    clips = [_clip(waveform, max_samples) for waveform in waveforms]
    samples = torch.tensor([len(clip) for clip in clips])
    spectral = is_spectral(extractor)
    padding = "max_length" if spectral else "longest"
    batch = extractor(clips, sampling_rate=SAMPLE_RATE, padding=padding, return_tensors="pt")
    if spectral:
        values = batch["input_features"]
        # Columns that hear anything of the clip; the rest is silence up to a fixed length.
        steps = (samples + extractor.hop_length - 1) // extractor.hop_length
        return {"values": values, "steps": steps.clamp(max=values.shape[-1])}
    inputs = {"values": batch["input_values"], "steps": samples}
    if "attention_mask" in batch:
        inputs["attention_mask"] = batch["attention_mask"]
    return inputs


def _clip(waveform: Waveform, max_samples: int) -> Waveform:
    """Cut a clip; one under 25 ms, for which no encoder has a frame, is padded to that."""
    clip = waveform[:max_samples]
    return np.pad(clip, (0, max(0, WINDOW - len(clip))))


def encode(classifier: AudioClassifier, rows: Iterable[Mapping[str, Tensor]]) -> Encoding:
    """Return features and scores of rows, on the CPU, in their order.

    Args:
        classifier: fine-tuned; put into evaluation mode, in which it stays.
        rows: the inputs of each row by itself. Together, padding would change them: Wav2Vec2's
            reference model has no mask, and a row's features must not depend on its company.
    """
    classifier.eval()
    device = classifier.classify.weight.device
    features, scores = [], []
    with torch.inference_mode():
        for inputs in rows:
            feature = classifier.features(**{name: x.to(device) for name, x in inputs.items()})
            features.append(feature.float().cpu())
            scores.append(classifier.classify(feature).float().softmax(1).cpu())
    return Encoding(torch.cat(features), torch.cat(scores))


def encode_sounds(
    classifier: AudioClassifier,
    extractor: Any,
    files: Mapping[str, Path],
    max_samples: int,
    *,
    folder: Path | None = None,
) -> Encoding:
    """Return what pipeline 1 says of sound files by uid, computed once and kept in the cache.

    Args:
        classifier: fine-tuned.
        extractor: its encoder's feature extractor.
        files: by uid.
        max_samples: of a clip.
        folder: the cache; the program's own by default.

    Raises:
        DatasetError: a file is absent or no sound.
    """

    def key() -> Key:
        return {
            "kind": "speech encoder",
            "weights": fingerprint(classifier),
            "files": sounds.digest(files.values()),
            "extractor": extractor.to_json_string(),
            "max_samples": max_samples,
        }

    # A generator: clips are decoded where they are not in the cache.
    rows = (audio_inputs(extractor, [decode(path)], max_samples) for path in files.values())
    kept = torch.tensor(
        cached(key, tuple(files), lambda: join([encode(classifier, rows)]).numpy(), folder=folder)
    )
    width = classifier.classify.in_features
    return Encoding(kept[:, :width], kept[:, width:])


class Fusion(nn.Module):
    """Pipeline 3: four linear layers, ReLU and dropout between them."""

    def __init__(self, settings: FusionSettings, inputs: int, classes: int) -> None:
        super().__init__()
        self.inputs = inputs
        layers: list[nn.Module] = []
        for hidden in settings.hidden:
            layers += [nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(settings.dropout)]
            inputs = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map joined encodings (B, inputs) to logits (B, classes)."""
        logits: Tensor = self.layers(x)
        return logits


def join(encodings: Sequence[Encoding]) -> Tensor:
    """Return what `Fusion` takes: features and scores of each encoding, beside each other.

    One encoding alone is allowed: a fusion that hears only, to be compared with one that reads.

    Raises:
        ValueError: they hold different numbers of rows.
    """
    if len({len(encoding.features) for encoding in encodings}) != 1:
        raise ValueError("encodings of the same rows are needed, in the same order")
    return torch.cat([part for e in encodings for part in (e.features, e.scores)], 1)
