"""Sound to features: files, resampling, noise, log-mels against two references."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from llm_emo import datasets
from llm_emo.baselines import audio
from llm_emo.baselines.speech_settings import Noise
from llm_emo.errors import DatasetError, JobFailed

soundfile = pytest.importorskip("soundfile")


def sweep(samples=8_000):
    """A tone that rises from 200 to 6,200 Hz and fades."""
    t = np.arange(samples) / 16_000
    phase = 2 * np.pi * (200 * t + 6_000 * t**2)
    return (0.5 * np.sin(phase) * np.exp(-3 * t)).astype(np.float32)


def speech_like(seconds, seed=0):
    generator = np.random.default_rng(seed)
    n = round(seconds * 16_000)
    return (generator.standard_normal(n) * np.hanning(n) * 0.1).astype(np.float32)


def written(path, samples, rate=16_000, subtype="FLOAT"):
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


# Log-mels


def test_log_mels_are_those_of_librosa(fixtures):
    # librosa 0.11.0 of the sweep, padded to 7.5 s: power_to_db(melspectrogram(y, sr=16000,
    # n_fft=400, hop_length=160, win_length=400, n_mels=40), top_db=None), frames 0 to 52.
    expected = np.load(fixtures / "audio" / "log_mel_librosa.npy")
    found = audio.log_mel(sweep()).numpy()
    assert found.shape == (52, 40)
    np.testing.assert_allclose(found, expected[:52], atol=1e-4)  # dB
    assert (expected[52] <= audio.FLOOR_DB).all()  # librosa hears nothing in the next one


def test_log_mels_are_those_of_transformers():
    waveform = speech_like(2.0)
    expected = spectrogram(
        np.pad(waveform, (0, 88_000)),
        window_function(400, "hann"),
        frame_length=400,
        hop_length=160,
        power=2.0,
        pad_mode="constant",
        mel_filters=mel_filter_bank(201, 40, 0.0, 8_000.0, 16_000, "slaney", "slaney"),
        log_mel="dB",
    ).T
    found = audio.log_mel(waveform).numpy()
    assert expected.shape == (751, 40)
    np.testing.assert_allclose(found, expected[: len(found)], atol=1e-4)


def test_seven_and_a_half_seconds_are_40_bands_by_750_frames():
    assert audio.log_mel(speech_like(7.5)).shape == (750, 40)


@given(samples=st.integers(1, 5_000))
def test_padding_with_the_floor_is_padding_the_sound_with_zeros(samples):
    # The whole matrix of 750 frames is what the paper's zero-padded clip gives.
    waveform = np.ones(samples, np.float32)
    batch, lengths = audio.pad([audio.log_mel(waveform)])
    whole = audio.log_mel(np.pad(waveform, (0, audio.SAMPLES - samples)))
    assert batch.shape == (1, 750, 40)
    assert torch.equal(batch[0], whole)
    last = int(lengths)
    assert (whole[last:] == audio.FLOOR_DB).all()
    # No frame too many is called valid, but a Hann window's first weights are next to nothing.
    assert (whole[last - 1] > audio.FLOOR_DB).any() or (samples - 1 + 200) % 160 < 4


def test_a_long_clip_keeps_its_beginning():
    long = speech_like(9.0)
    assert torch.equal(audio.log_mel(long), audio.log_mel(long[: audio.SAMPLES]))


def test_a_batch_is_as_long_as_asked_for_or_as_its_longest_clip():
    clips = [audio.log_mel(speech_like(s)) for s in (0.3, 1.0)]
    batch, lengths = audio.pad(clips, None)
    assert batch.shape[1] == int(lengths.max()) == len(clips[1])
    with pytest.raises(ValueError, match="more than 50"):
        audio.pad(clips, 50)


def test_a_clip_without_samples_is_refused():
    with pytest.raises(ValueError, match="without samples"):
        audio.log_mel(np.zeros(0, np.float32))


# Noise


def noise(copies):
    return Noise(copies=copies, low=20.0, high=30.0)


@given(snr=st.floats(-10, 60), seed=st.integers(0, 100))
def test_noise_has_exactly_the_power_asked_for(snr, seed):
    waveform = speech_like(0.5, seed).astype(np.float64)
    noise = audio.with_noise(waveform, snr, np.random.default_rng(seed)) - waveform
    ratio = np.square(waveform).mean() / np.square(noise).mean()
    assert 10 * np.log10(ratio) == pytest.approx(snr, abs=0.05)


def test_noise_is_white():
    tone = np.sin(np.arange(16_000)).astype(np.float32)
    noise = audio.with_noise(tone, 0, np.random.default_rng(0)) - tone
    power = np.square(np.abs(np.fft.rfft(noise)))[1:8_001].reshape(8, 1_000).mean(1)
    assert power.max() / power.min() < 1.3


def test_silence_stays_silence():
    silence = np.zeros(100, np.float32)
    assert not audio.with_noise(silence, 20, np.random.default_rng(0)).any()


def test_train_and_dev_get_noisy_copies_and_test_gets_none():
    clip = speech_like(0.2)
    for split, expected in (("train", 4), ("dev", 4), ("test", 1)):
        made = audio.variants(clip, "a", split, noise(3), seed=0)
        assert len(made) == expected
        assert made[0] is clip
        assert len({copy.tobytes() for copy in made}) == expected
    assert len(audio.variants(clip, "a", "train", noise(0), seed=0)) == 1


def test_noise_is_decided_by_seed_uid_and_copy_alone():
    clip, twice = speech_like(0.2), noise(2)
    first = audio.variants(clip, "a", "train", twice, seed=0)
    np.random.seed(7)  # what else was drawn does not matter
    assert np.array_equal(audio.variants(clip, "a", "dev", twice, seed=0)[2], first[2])
    for uid, seed in (("b", 0), ("a", 1)):
        assert not np.array_equal(audio.variants(clip, uid, "train", twice, seed)[1], first[1])


def test_settings_of_noise_are_checked():
    with pytest.raises(ValueError, match="copies"):
        noise(-1)
    with pytest.raises(ValueError, match="low"):
        Noise(copies=1, low=30.0, high=20.0)


# Files


def test_samples_come_as_they_are_in_the_file(tmp_path):
    path = written(tmp_path / "a.wav", sweep())
    assert np.array_equal(audio.decode(path), sweep())
    assert audio.decode(path).dtype == np.float32


def test_channels_are_averaged(tmp_path):
    left, right = sweep(), np.full(8_000, 0.25, np.float32)
    path = written(tmp_path / "a.wav", np.stack((left, right), 1))
    np.testing.assert_allclose(audio.decode(path), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("samples", [4_000, 4_001, 12_345])
def test_another_rate_becomes_16_kHz_and_the_tone_stays_the_tone(tmp_path, rate, samples):
    pytest.importorskip("soxr")
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate)
    found = audio.decode(written(tmp_path / "a.wav", tone, rate))
    assert len(found) == -(-samples * 16_000 // rate)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(found)) / 16_000)
    middle = slice(500, len(found) - 500)  # at both ends a filter sees what is not there
    assert np.abs(found[middle] - expected[middle]).max() < 1e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such sound file"),
        (b"RIFF not a sound", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_a_file_that_is_absent_or_no_sound_is_named(tmp_path, content, message):
    path = tmp_path / "a.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        audio.decode(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("samples", "message"), [([], "no samples"), ([0.0, float("nan")], "no numbers")]
)
def test_a_file_without_usable_samples_is_named(tmp_path, samples, message):
    path = written(tmp_path / "a.wav", np.array(samples, np.float32))
    with pytest.raises(DatasetError, match=message):
        audio.decode(path)


@pytest.mark.parametrize(("library", "rate"), [("soundfile", 16_000), ("soxr", 8_000)])
def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, library, rate):
    path = written(tmp_path / "a.wav", sweep(), rate)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(JobFailed, match=rf"{library}.*llm_emo\[speech\]"):
        audio.decode(path)


@pytest.mark.parametrize("corpus", ["emodb", "iemocap"])
def test_sound_that_a_loader_names_is_read(fixtures, corpus):
    rows = datasets.utterances(datasets.load(corpus, fixtures)["all"])
    named = [Path(row.audio) for row in rows if row.audio is not None]
    assert named
    assert all(audio.log_mel(audio.decode(path)).isfinite().all() for path in named)


def test_clips_of_emodb_are_speech_of_a_few_seconds(shared_data):
    paths = sorted((shared_data / "emodb" / "wav").glob("*.wav"))
    if not paths:
        pytest.skip("EMO-DB is not there")
    for path in paths[::13]:
        features = audio.log_mel(audio.decode(path))
        assert 100 < len(features) <= 750
        assert features.isfinite().all()
        assert features.max() > -20  # somebody speaks


@pytest.mark.parametrize("samples", [1, 159, 4_000, 24_321, 119_999])
def test_frames_are_those_of_the_clip_padded_to_7_5_seconds(samples):
    waveform = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    whole = audio.log_mel(np.pad(waveform, (0, audio.SAMPLES - samples)))
    frames = audio.frame_count(samples)
    torch.testing.assert_close(audio.log_mel(waveform), whole[:frames])
    assert (whole[frames:] == audio.FLOOR_DB).all()


def test_the_last_frame_hears_to_the_end():
    click = np.zeros(audio.SAMPLES, np.float32)
    click[-100] = 1
    assert (audio.log_mel(click)[-1] > audio.FLOOR_DB).all()
    assert (audio.log_mel(click)[:-2] == audio.FLOOR_DB).all()
