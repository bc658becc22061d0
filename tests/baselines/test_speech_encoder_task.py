"""Method `speech_encoder`: every kind of encoder from a folder to scores, and back from a run."""

import pytest
import torch

pytest.importorskip("soundfile")

import speech_fixture
import test_fusion as kinds
from torch import nn
from transformers import AutoModel

from llm_emo.baselines import fitting, speech_encoder_task
from llm_emo.errors import ModelError

each_kind = kinds.every_audio
MASKED = ("wav2vec2-layer", "whisper")
"""Those that can tell padding from silence."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return speech_fixture.corpus(tmp_path_factory.mktemp("data"))


def encoder(folder, kind="wav2vec2"):
    torch.manual_seed(0)
    config = kinds.audio_config(kind)
    setattr(config, "encoder_layerdrop" if kind == "whisper" else "layerdrop", 0.5)
    AutoModel.from_config(config).save_pretrained(folder)
    kinds.extractor(kind).save_pretrained(folder)
    return folder


def prepared(root, folder, max_samples=6_000):
    head = {"dropout": 0.1, "max_samples": max_samples}
    method = {"kind": "speech_encoder", "name": str(folder), "head": head}
    return speech_fixture.experiment(root, method)


def created(experiment):
    torch.manual_seed(0)
    return speech_encoder_task.create(experiment.recipe.method, experiment)


def step(classifier, items, rate=5e-3):
    optimiser = torch.optim.Adam(classifier.model.parameters(), lr=rate)
    labels = torch.tensor([item.labels[0] for item in items])
    scores = classifier.scores(classifier.model.train(), classifier.batch(items))
    nn.functional.cross_entropy(scores, labels).backward()
    optimiser.step()


def said(classifier, rows):
    return torch.tensor([shares for _, shares in classifier.probabilities(rows, "test")])


@each_kind
def test_every_encoder_is_trained_saved_and_loaded_to_the_bit(root, kind, tmp_path):
    experiment = prepared(root, encoder(tmp_path / "encoder", kind))
    classifier = created(experiment)
    train, test = experiment.rows("train"), experiment.rows("test")
    before = said(classifier, test)
    for _ in range(3):
        step(classifier, classifier.items(train, "train", augmented=True))
    after = said(classifier, test)
    assert not torch.allclose(after, before, atol=1e-4)
    (tmp_path / "run").mkdir()
    classifier.save(tmp_path / "run")
    (tmp_path / "encoder").rename(tmp_path / "gone")
    state = torch.get_rng_state()
    loaded = speech_encoder_task.load(experiment.recipe.method, experiment, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(said(loaded, test), after)
    facts = classifier.facts()
    assert facts["heard"]["train"]["clips"] == len(train) == 12
    assert facts["encoder_parameters"] == sum(
        p.numel() for p in classifier.model.encoder.parameters()
    )


@each_kind
def test_predictions_do_not_depend_on_company(root, kind, tmp_path):
    experiment = prepared(root, encoder(tmp_path / "encoder", kind))
    classifier, rows = created(experiment), experiment.rows("test")
    alone = torch.cat([said(classifier, [row]) for row in rows])
    same = torch.allclose if kind in MASKED else torch.equal
    assert same(said(classifier, rows), alone)


@each_kind
def test_dev_is_measured_by_what_is_predicted_of_its_rows(root, kind, tmp_path, monkeypatch):
    experiment = prepared(root, encoder(tmp_path / "encoder", kind))
    job = fitting.prepare(experiment, experiment.recipe.train)
    classifier, heard = job.task.classifier, []
    scores = type(classifier).scores

    def listening(self, model, batch):
        heard.append({name: value.shape for name, value in batch.items()})
        return scores(self, model, batch)

    monkeypatch.setattr(type(classifier), "scores", listening)
    measured = job.measure(job.model)
    dev = experiment.rows("dev")
    passes = heard[:]
    heard.clear()
    predicted = dict(classifier.probabilities(dev, "dev"))
    assert passes == heard
    assert len(passes) == (1 if kind in MASKED else len(dev))
    right = sum(
        classifier.names[shares.index(max(shares))] == row.gold
        for row, shares in zip(dev, predicted.values(), strict=True)
    )
    assert measured["accuracy"] == pytest.approx(right / len(dev))


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_features_are_kept_and_fit_the_predictions(root, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "cache"))
    experiment = prepared(root, encoder(tmp_path / "encoder", kind))
    classifier, rows = created(experiment), experiment.rows("test")
    encoding = classifier.encode(rows, "test")
    assert encoding.features.shape == (12, 16)
    torch.testing.assert_close(encoding.scores, said(classifier, rows).float())
    monkeypatch.setattr(type(classifier.model), "features", None)
    assert torch.equal(classifier.encode(rows, "test").features, encoding.features)


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_all_of_it_learns_in_every_step(root, kind, tmp_path):
    experiment = prepared(root, encoder(tmp_path / "encoder", kind))
    classifier = created(experiment)
    items = classifier.items(experiment.rows("train"), "train", augmented=True)
    for _ in range(4):  # a layer that is dropped half the time would be missed once
        classifier.model.zero_grad()
        step(classifier, items, rate=0.0)
        silent = [
            name
            for name, parameter in classifier.model.named_parameters()
            if parameter.grad is None and parameter.requires_grad
        ]
        assert not silent


def test_clips_lose_what_is_beyond_their_length(root, tmp_path):
    experiment = prepared(root, encoder(tmp_path / "encoder"), max_samples=4_000)
    classifier = created(experiment)
    items = classifier.items(experiment.rows("train"), "train", augmented=True)
    assert max(len(item.inputs) for item in items) == 4_000
    assert classifier.facts()["heard"]["train"]["cut"] > 0
    assert classifier.batch(items)["values"].shape == (12, 4_000)


def test_what_is_no_speech_encoder_is_refused(root, tmp_path):
    with pytest.raises(ModelError, match=r"no folder with a config\.json"):
        created(prepared(root, tmp_path / "nothing"))
    folder = encoder(tmp_path / "encoder")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot be loaded as a speech encoder"):
        created(prepared(root, folder))
    other = encoder(tmp_path / "rate")
    made = kinds.extractor("wav2vec2")
    made.sampling_rate = 8_000
    made.save_pretrained(other)
    with pytest.raises(ModelError, match="16,000 samples a second"):
        created(prepared(root, other))
