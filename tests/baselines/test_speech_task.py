"""Methods `ilt` and `cat`: sound files to scores, a folder and back, features kept."""

import json

import pytest
import torch

pytest.importorskip("soundfile")

import speech_fixture
from torch import nn

from llm_emo.baselines import audio, speech_task
from llm_emo.errors import DatasetError, ModelError, RecipeError
from llm_emo.types import Row, Utterance

each_kind = pytest.mark.parametrize("kind", speech_fixture.NETWORKS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return speech_fixture.corpus(tmp_path_factory.mktemp("data"))


def prepared(root, kind="ilt", network=(), noise=(), **changes):
    method = {
        "kind": kind,
        "network": speech_fixture.NETWORKS[kind] | dict(network),
        "noise": speech_fixture.NOISE | dict(noise),
    }
    return speech_fixture.experiment(root, method, **changes)


def created(experiment, seed=0):
    torch.manual_seed(seed)
    return speech_task.create(experiment.recipe.method, experiment)


def scored(classifier, items):
    classifier.model.eval()
    with torch.inference_mode():
        return classifier.scores(classifier.model, classifier.batch(items))


def trained(classifier, rows, steps=30):
    items = classifier.items(rows, "train", augmented=True)
    labels = torch.tensor([item.labels[0] for item in items])
    optimiser = torch.optim.Adam(classifier.model.parameters(), lr=5e-3)
    for _ in range(steps):
        scores = classifier.scores(classifier.model.train(), classifier.batch(items))
        nn.functional.cross_entropy(scores, labels).backward()
        optimiser.step()
        optimiser.zero_grad()
    return classifier


def test_train_and_dev_hear_noisy_copies_and_test_and_predictions_do_not(root):
    experiment = prepared(root, noise={"copies": 2})
    classifier = created(experiment)
    for split, augmented, each in (
        ("train", True, 3), ("dev", True, 3), ("test", True, 1), ("train", False, 1),
    ):  # fmt: skip
        rows = experiment.rows(split)
        items = classifier.items(rows, split, augmented=augmented)
        assert [item.uids[0] for item in items] == [
            row.utterance.uid for row in rows for _ in range(each)
        ]
        names = classifier.names
        assert all(names[item.labels[0]] == gold for item, gold in zip(
            items, [row.gold for row in rows for _ in range(each)], strict=True
        ))  # fmt: skip
        assert classifier.facts()["heard"][split]["items"] == each * len(rows)
    clean, noisy = classifier.items(rows[:1], "train", augmented=True)[:2]
    assert not torch.equal(clean.inputs, noisy.inputs)


def test_noise_depends_on_seed_and_clip_alone(root):
    rows = prepared(root).rows("train")
    one, again, other = (created(prepared(root, seed=seed)) for seed in (0, 0, 1))
    first = [c.items(rows[:3], "train", augmented=True)[1].inputs for c in (one, other)]
    last = again.items(rows[:1], "train", augmented=True)[1].inputs
    assert torch.equal(first[0], last)
    assert not torch.equal(first[0], first[1])


@each_kind
def test_bands_are_standardised_by_the_training_clips_and_their_copies(root, kind):
    experiment = prepared(root, kind)
    classifier = created(experiment)
    items = classifier.items(experiment.rows("train"), "train", augmented=True)
    frames = torch.cat([item.inputs for item in items])
    torch.testing.assert_close(classifier.model.standardise.mean, frames.mean(0))
    dev = classifier.items(experiment.rows("dev"), "dev", augmented=True)
    assert not torch.allclose(
        torch.cat([item.inputs for item in dev]).mean(0), frames.mean(0), atol=1e-3
    )


@pytest.mark.parametrize(("mask", "frames"), [(True, None), (False, audio.FRAMES)])
def test_a_batch_is_as_long_as_it_must_be(root, mask, frames):
    experiment = prepared(root, network={"mask": mask})
    classifier = created(experiment)
    items = classifier.items(experiment.rows("test"), "test", augmented=False)
    batch = classifier.batch(items)
    longest = max(len(item.inputs) for item in items)
    assert batch["features"].shape == (len(items), frames or longest, 40)
    assert batch["lengths"].tolist() == [len(item.inputs) for item in items]


@each_kind
def test_loaded_it_gives_the_bits_of_what_was_saved(root, kind, tmp_path):
    experiment = prepared(root, kind)
    classifier = trained(created(experiment), experiment.rows("train"), steps=3)
    classifier.save(tmp_path)
    before = torch.get_rng_state()
    loaded = speech_task.load(experiment.recipe.method, experiment, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    items = classifier.items(experiment.rows("test"), "test", augmented=False)
    assert torch.equal(scored(loaded, items), scored(classifier, items))
    assert torch.equal(loaded.model.standardise.mean, classifier.model.standardise.mean)


def test_other_settings_or_a_lost_file_are_told(root, tmp_path):
    experiment = prepared(root)
    created(experiment).save(tmp_path)
    other = prepared(root, network={"fusion": "concatenation"})
    with pytest.raises(ModelError, match="does not fit"):
        speech_task.load(other.recipe.method, other, tmp_path)
    (tmp_path / speech_task.WEIGHTS).unlink()
    with pytest.raises(ModelError, match="no such file"):
        speech_task.load(experiment.recipe.method, experiment, tmp_path)


@each_kind
def test_tones_are_learned_and_told_apart_on_another_speaker(root, kind):
    experiment = prepared(root, kind, noise={"copies": 0})
    classifier = trained(created(experiment), experiment.rows("train"), steps=60)
    rows = experiment.rows("test")
    found = dict(classifier.probabilities(rows, "test"))
    assert list(found) == [row.utterance.uid for row in rows]
    best = [
        classifier.names[max(range(4), key=found[row.utterance.uid].__getitem__)] for row in rows
    ]
    assert sum(own == row.gold for own, row in zip(best, rows, strict=True)) >= 11


@each_kind
def test_features_are_what_the_last_layer_reads_and_are_computed_once(
    root, kind, tmp_path, monkeypatch
):
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path))
    experiment = prepared(root, kind)
    classifier, rows = created(experiment), experiment.rows("test")
    encoding = classifier.encode(rows, "test")
    assert encoding.features.shape == (len(rows), classifier.model.classify.in_features)
    scores = classifier.model.classify(encoding.features).softmax(1)
    torch.testing.assert_close(scores, encoding.scores)
    expected = [shares for _, shares in classifier.probabilities(rows, "test")]
    torch.testing.assert_close(encoding.scores.double(), torch.tensor(expected).double())
    monkeypatch.setattr(classifier, "_extract", None)
    again = classifier.encode(rows, "test")
    assert torch.equal(again.features, encoding.features)
    with torch.no_grad():
        classifier.model.classify.bias.add_(1.0)
    with pytest.raises(TypeError):  # other weights are other features
        classifier.encode(rows, "test")


def test_ilt_tells_the_weights_that_it_learned(root, tmp_path):
    experiment = prepared(root)
    classifier = trained(created(experiment), experiment.rows("train"), steps=5)
    classifier.save(tmp_path)
    shares = json.loads((tmp_path / speech_task.LEARNED).read_text())["fusion_weights"]
    assert shares == classifier.learned()["fusion_weights"]
    assert shares["lstm"] + shares["transformer"] == pytest.approx(1)
    assert shares["lstm"] != 0.5
    assert created(prepared(root, "cat")).learned() == {}


def test_a_row_without_sound_and_sizes_that_do_not_fit_are_told(root, tmp_path):
    experiment = prepared(root)
    classifier = created(experiment)
    silent = Row(Utterance("Ses01", "hello", label="neu"), "neutral")
    with pytest.raises(DatasetError, match="Ses01: this copy of the corpus has no sound"):
        classifier.items([silent], "test", augmented=False)
    gone = Row(Utterance("a", "a01", audio=str(tmp_path / "gone.wav")), "neutral")
    with pytest.raises(DatasetError, match="no such sound file"):
        classifier.items([gone], "test", augmented=False)
    with pytest.raises(RecipeError, match=r"'method.network': transformer: 3 heads"):
        created(prepared(root, network={"transformer": speech_fixture.TRANSFORMER | {"heads": 3}}))
