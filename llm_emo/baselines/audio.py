"""Sound in, log-mel features out: 40 bands x 750 frames of 7.5 s, as ILT and CAT take them.

Paper: He, Minematsu and Saito, "Effective Integration of Transformer for Network-based Speech
Emotion Recognition", section 3.2. Its order is kept: white noise at a high signal-to-noise ratio
is added to copies of the training and validation clips; then a clip is cut or padded with zeros
to 7.5 s; then come log-mels with windows of 25 ms every 10 ms.

Where the paper is silent:

- The spectrum has as many points as the window (400), the window is a Hann window, power is
  summed by Slaney's mel filters up to 8 kHz, and the logarithm is 10 log10 with a floor of
  -100 dB: the defaults of librosa, which the paper names, without its cut at 80 dB under the
  loudest point, which would let one click change every frame.
- Frames are centred, which gives 751 of 7.5 s. The last one is left out.
- "High" is drawn for each noisy copy, evenly between the bounds of `Noise`.
- A cut clip keeps its beginning.

Letters: N samples, T frames, M mel bands, B clips.
"""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from llm_emo.baselines.speech_settings import Noise
from llm_emo.errors import DatasetError, JobFailed
from llm_emo.types import Split

SAMPLE_RATE = 16_000
MELS = 40
WINDOW = 400
"""Samples: 25 ms."""
HOP = 160
"""Samples: 10 ms."""
FRAMES = 750
SAMPLES = FRAMES * HOP
"""7.5 s."""
FLOOR_DB = -100.0
"""What a frame of silence measures."""

Waveform = npt.NDArray[np.float32]
"""Shape (N,), 16 kHz, one channel, usually within [-1, 1]."""


def decode(path: Path) -> Waveform:
    """Return the sound in a file as one channel at 16 kHz; shape (N,).

    Channels are averaged; another rate is converted by soxr at its high quality, and the result
    has ceil(N * 16000 / rate) samples.

    Raises:
        DatasetError: the file is absent, is no sound that libsndfile reads, or holds no sample
            or one that is no number.
        JobFailed: the libraries are not installed.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package without its C library
        raise _missing("soundfile", path) from error
    if not path.is_file():
        raise DatasetError(f"{path}: no such sound file; is the corpus complete?")
    try:
        channels, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (N, channels)
    except (soundfile.LibsndfileError, OSError) as error:
        raise DatasetError(f"{path}: cannot be read as sound ({error}); is it complete?") from error
    waveform: Waveform = channels.mean(axis=1)
    if not waveform.size:
        raise DatasetError(f"{path}: found no samples; expected sound")
    if not np.isfinite(waveform).all():
        raise DatasetError(f"{path}: found samples that are no numbers; expected sound")
    return waveform if rate == SAMPLE_RATE else _resampled(waveform, rate, path)


def _resampled(waveform: Waveform, rate: int, path: Path) -> Waveform:
    try:
        import soxr  # type: ignore[import-untyped]
    except ImportError as error:
        raise _missing("soxr", path) from error
    wanted = -(-len(waveform) * SAMPLE_RATE // rate)
    # soxr rounds the length to the nearest; the last sample may be one short.
    return _fitted(soxr.resample(waveform, rate, SAMPLE_RATE, quality="HQ"), wanted)


def _missing(library: str, path: Path) -> JobFailed:
    return JobFailed(
        f"{path}: reading it needs {library}, which cannot be loaded; "
        "install the extra: pip install 'llm_emo[speech]'"
    )


def _fitted(waveform: Waveform, samples: int) -> Waveform:
    """Cut the end off, or pad it with zeros; shape (samples,)."""
    cut = waveform[:samples]
    return np.pad(cut, (0, samples - len(cut))).astype(np.float32, copy=False)


def variants(waveform: Waveform, uid: str, split: Split, noise: Noise, seed: int) -> list[Waveform]:
    """Return the clip, and after it its noisy copies in train and dev; in test there are none.

    The seed, the uid and the copy's number decide the noise, whatever was drawn before.
    """
    copies = 0 if split == "test" else noise.copies
    return [waveform, *(_noisy(waveform, noise, f"{seed}/{n}/{uid}") for n in range(copies))]


def _noisy(waveform: Waveform, noise: Noise, name: str) -> Waveform:
    # A hash, not hash(): that differs from process to process.
    digest = hashlib.sha256(name.encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return with_noise(waveform, generator.uniform(noise.low, noise.high), generator)


def with_noise(waveform: Waveform, snr: float, generator: np.random.Generator) -> Waveform:
    """Return the clip with Gaussian white noise whose power is `snr` dB under the clip's own.

    The noise drawn is scaled to that power exactly. Silence stays silence.
    """
    white = generator.standard_normal(len(waveform))
    power = np.square(waveform, dtype=np.float64).mean()
    wanted = power / 10 ** (snr / 10)
    noisy: Waveform = waveform + white * np.sqrt(wanted / np.square(white).mean())
    return noisy.astype(np.float32)


@functools.cache
def _filters() -> Tensor:
    """Return the mel filters; shape (201, M)."""
    filters = mel_filter_bank(
        num_frequency_bins=WINDOW // 2 + 1,
        num_mel_filters=MELS,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters)


def frame_count(samples: int) -> int:
    """Return how many of the 750 frames hear anything of a clip of `samples`.

    Frame t sees the samples from 160 t - 200 up to 160 t + 199.

    >>> frame_count(1), frame_count(120_000)
    (2, 750)
    """
    return min(FRAMES, (samples - 1 + WINDOW // 2) // HOP + 1)


def log_mel(waveform: Waveform) -> Tensor:
    """Return the log-mel frames, in dB, that hear anything of the clip; shape (T, M), T <= 750.

    `pad` makes all 750 of it: the rest is -100 dB throughout, as the paper's zero-padded clip
    gives it. Computed in float64, because a quiet band beside a loud one is lost in float32's
    rounding, and returned in float32.
    """
    if not len(waveform):
        raise ValueError("a clip without samples has no frames")
    frames = frame_count(len(waveform))
    # As far as the last of these frames sees; silence after it would be computed for nothing.
    heard = min(SAMPLES, (frames - 1) * HOP + WINDOW // 2)
    signal = torch.from_numpy(_fitted(waveform, heard)).double()
    window = torch.hann_window(WINDOW, dtype=torch.float64)
    spectrum = torch.stft(
        signal, WINDOW, HOP, window=window, center=True, pad_mode="constant", return_complex=True
    )  # (201, T or T + 1)
    power = spectrum[:, :frames].abs().square().T @ _filters()  # (T, M)
    decibels = 10 * power.clamp(min=10 ** (FLOOR_DB / 10)).log10()
    return decibels.float()


def pad(clips: Sequence[Tensor], frames: int | None = FRAMES) -> tuple[Tensor, Tensor]:
    """Return clips of unequal length as one batch.

    Args:
        clips: what `log_mel` returned, shapes (T_i, M).
        frames: of the batch; None is the longest clip's, which is enough for a network that
            masks padding.

    Returns:
        The features (B, T, M), padded with -100 dB, and the frames of each clip (B,).
    """
    lengths = torch.tensor([len(clip) for clip in clips])
    longest = int(lengths.max())
    if frames is not None and longest > frames:
        raise ValueError(f"a clip has {longest} frames, more than {frames}")
    batch = torch.full((len(clips), longest if frames is None else frames, MELS), FLOOR_DB)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    return batch, lengths
