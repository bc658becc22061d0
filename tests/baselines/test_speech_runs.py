"""What hears, what reads, and both together, as a user runs them, on tones and tiny networks."""

import json
import shutil

import pytest

pytest.importorskip("soundfile")

import speech_fixture
import test_encoder
import test_speech_encoder_task
from program import call, interrupted, settings

from llm_emo.baselines import exported

STEPS = ("train.epochs=3", "train.batch_size=8", "train.micro_batch_size=8",
         "train.learning_rate=5e-3")  # fmt: skip
NETWORK = (
    "method.network.cnn.channels=[2, 4]",
    "method.network.cnn.dropout=0.0",
    "method.network.transformer.inner=16",
    "method.network.transformer.dropout=0.0",
)
LAYERS = "method.network.hidden=[16, 8, 8]"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return speech_fixture.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "cache"))


def train(root, recipe, folder, *changes):
    return call("train", recipe, "-o", folder, "--data-root", root, *settings(*STEPS, *changes))


def speech(folder):
    """Return what makes a recipe one of the speech encoder in a folder."""
    head = "{dropout: 0.1, max_samples: 4000}"
    return f"method={{kind: speech_encoder, name: {folder}, head: {head}}}"


@pytest.fixture(scope="module")
def below(root, tmp_path_factory):
    """Finished runs that read and hear; to be read, never written."""
    folder = tmp_path_factory.mktemp("below")
    (folder / "words").mkdir()
    words = test_encoder.save(folder / "words", "deberta-v2")
    head = "method.head={max_length: 12, dropout: 0.0}"
    train(root, "emodb/text_encoder", folder / "text", f"method.name={words}", head).ok()
    for kind in ("ilt", "cat"):
        train(root, f"emodb/{kind}", folder / kind, *NETWORK).ok()
    heard = test_speech_encoder_task.encoder(folder / "sounds")
    train(root, "emodb/cat", folder / "speech_encoder", speech(heard)).ok()
    return folder


def test_check_tells_nothing_of_the_few_clips_that_it_only_tries(root):
    options = ("--data-root", root, *settings(*NETWORK), "--json")
    told = json.loads(call("check", "emodb/ilt", *options).ok().out)
    heard = {split: counts["clips"] for split, counts in told["facts"]["heard"].items()}
    assert heard == {"train": told["splits"]["train"]["rows"]}  # all of them standardise


def probabilities(run):
    lines = (run / "test.predictions.jsonl").read_text().splitlines()[1:]
    return {row["uid"]: row["probabilities"] for row in map(json.loads, lines)}


@pytest.mark.parametrize("kind", ["ilt", "cat", "speech_encoder"])
def test_a_run_that_hears_is_predicted_and_exported(below, root, kind, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(below / kind, run)
    call("evaluate", run, "--split", "test", "--data-root", root).ok()
    said = probabilities(run)
    assert len(said) == 12
    call("export", run, "-o", tmp_path / "out").ok()
    shutil.rmtree(run)
    wav = root / "emodb" / "wav" / f"{min(said)}.wav"
    (labelled,) = exported.load(tmp_path / "out").label([wav])
    assert labelled.probabilities == pytest.approx(said[min(said)], abs=1e-5)


@pytest.mark.parametrize("hears", ["ilt", "cat", "speech_encoder"])
def test_a_fusion_learns_from_finished_runs_and_needs_them_no_more(
    below, root, hears, tmp_path, monkeypatch
):
    for name in ("text", hears):
        shutil.copytree(below / name, tmp_path / name)
    runs = (f"method.text_run={tmp_path / 'text'}", f"method.audio_run={tmp_path / hears}")
    run = tmp_path / "run"
    train(root, "emodb/fusion", run, *runs, LAYERS).ok()
    training = json.loads((run / "environment.json").read_text())["training"]
    assert set(training["below"]) == {"text", "audio"}
    call("predict", run, "--split", "test", "--data-root", root).ok()
    first = probabilities(run)
    for name in ("text", hears, "cache"):
        shutil.rmtree(tmp_path / name)
    (run / "test.predictions.jsonl").unlink()
    call("predict", run, "--split", "test", "--data-root", root).ok()
    assert probabilities(run) == first
    call("export", run, "-o", tmp_path / "out").ok()
    uid = min(first)
    given = (uid[2:5], root / "emodb" / "wav" / f"{uid}.wav")  # a sentence's code, and its sound
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "fresh"))
    (labelled,) = exported.load(tmp_path / "out").label([given])
    assert not (tmp_path / "fresh").exists(), "what is deployed fills nobody's disk"
    assert labelled.probabilities == pytest.approx(first[uid], abs=1e-5)


@pytest.mark.parametrize("kind", ["ilt", "speech_encoder", "fusion"])
def test_a_resumed_run_equals_the_uninterrupted_one(below, root, kind, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    recipe, changes = {
        "ilt": ("emodb/ilt", NETWORK),
        "speech_encoder": ("emodb/cat", (speech(below / "sounds"),)),
        "fusion": ("emodb/fusion", (f"method.text_run={below / 'text'}",
                                    f"method.audio_run={below / 'ilt'}", LAYERS)),
    }[kind]  # fmt: skip
    train(root, recipe, whole, *changes).ok()
    with interrupted():
        train(root, recipe, broken, *changes).refused("--resume", code=130)
    call("train", broken / "recipe.yaml", "-o", broken, "--data-root", root, "--resume").ok()
    for run in (whole, broken):
        call("predict", run, "--split", "test", "--data-root", root).ok()
    assert probabilities(whole) == probabilities(broken)


def test_a_fusion_may_hear_alone(below, root, tmp_path):
    run = tmp_path / "run"
    train(root, "emodb/fusion_audio_only", run, f"method.audio_run={below / 'cat'}", LAYERS).ok()
    assert (run / "adapter" / "audio").is_dir()
    assert not (run / "adapter" / "text").exists()
    call("evaluate", run, "--split", "test", "--data-root", root).ok()
    said = probabilities(run)
    call("export", run, "-o", tmp_path / "out").ok()
    wav = root / "emodb" / "wav" / f"{min(said)}.wav"
    (labelled,) = exported.load(tmp_path / "out").label([wav])
    assert labelled.probabilities == pytest.approx(said[min(said)], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.fold=1", "was trained under another fold"),
        ("seed=1", "was trained under another seed"),
        ("method.audio_run=nowhere", "train it first"),
        ("method.text_run={cat}", "which hears; expected one that reads"),
        ("method.audio_run={text}", "which reads; expected one that hears"),
    ],
)
def test_a_fusion_refuses_runs_that_do_not_fit(below, root, change, message, tmp_path):
    runs = (f"method.text_run={below / 'text'}", f"method.audio_run={below / 'cat'}")
    wrong = change.format(cat=below / "cat", text=below / "text")
    train(root, "emodb/fusion", tmp_path / "run", *runs, LAYERS, wrong).refused(message)
    assert not (tmp_path / "run").exists()


def test_features_come_from_the_cache_the_second_time(below, root, tmp_path, monkeypatch):
    from llm_emo.baselines import speech_task

    audio = f"method.audio_run={below / 'cat'}"
    train(root, "emodb/fusion_audio_only", tmp_path / "one", audio, LAYERS).ok()
    monkeypatch.setattr(speech_task.SpeechClassifier, "_extract", None)
    train(root, "emodb/fusion_audio_only", tmp_path / "two", audio, LAYERS).ok()
    one, two = (tmp_path / name / "adapter" / "fusion.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
