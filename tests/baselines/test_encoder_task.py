"""Method `encoder`: rows to scores, a folder and back, features kept."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_encoder import CONFIGS, save

from llm_emo.baselines import encoder, encoder_task, storage
from llm_emo.baselines.kinds import Encoder
from llm_emo.errors import ModelError
from llm_emo.types import Row, Utterance

NAMES = ("joy", "anger", "neutral")
EXPERIMENT = SimpleNamespace(labels=SimpleNamespace(names=NAMES))
TEXTS = ("so sad", "we are glad", "", "we are so so so glad", "glad glad", "so " * 40 + "sad")
ROWS = tuple(Row(Utterance(f"row-{n}", text), NAMES[n % 3]) for n, text in enumerate(TEXTS))

each_pooling = pytest.mark.parametrize("pooling", ["first", "mean"])


def method(folder, pooling="first"):
    return Encoder(
        kind="encoder", name=str(folder), pooling=pooling, head={"max_length": 12, "dropout": 0.1}
    )


def made(tmp_path, pooling="first", kind="bert", **changes):
    """A classifier over a tiny encoder; without dropout in the encoder, with it in the head."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    classifier = encoder_task.create(method(save(folder, kind, **changes), pooling), EXPERIMENT)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # initial weights are so small that every text would look the same
        for parameter in classifier.model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return classifier


def scored(classifier, rows):
    """Return class scores in eval mode, shape (N, C), of rows that share one pass."""
    classifier.model.eval()
    items = classifier.items(rows, "dev", augmented=False)
    with torch.inference_mode():
        return classifier.scores(classifier.model, classifier.batch(items))


def test_every_row_is_an_item_with_its_label_and_uid(tmp_path):
    items = made(tmp_path).items(ROWS, "train", augmented=True)
    assert [item.labels for item in items] == [(0,), (1,), (2,), (0,), (1,), (2,)]
    assert [item.uids for item in items] == [(row.utterance.uid,) for row in ROWS]
    assert all(len(item.inputs) <= 12 and item.inputs[0] == 1 for item in items)


@each_pooling
@pytest.mark.parametrize("kind", CONFIGS)
def test_company_and_padding_change_nothing(kind, pooling, tmp_path):
    classifier = made(tmp_path, pooling, kind)
    together = scored(classifier, ROWS)
    alone = torch.cat([scored(classifier, [row]) for row in ROWS])
    assert together.shape == (6, 3)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@each_pooling
@pytest.mark.parametrize("kind", CONFIGS)
def test_loaded_it_gives_the_bits_of_what_was_saved_and_needs_no_original(kind, pooling, tmp_path):
    classifier = made(tmp_path, pooling, kind)
    with torch.no_grad():
        for parameter in classifier.model.parameters():
            parameter.add_(0.01)
    run = tmp_path / "adapter"
    run.mkdir()
    classifier.save(run)
    (tmp_path / "encoder").rename(tmp_path / "gone")
    before = torch.get_rng_state()
    loaded = encoder_task.load(classifier.method, EXPERIMENT, run)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(scored(loaded, ROWS), scored(classifier, ROWS))
    for path in run.iterdir():
        assert path.suffix in {".json", ".safetensors", ".txt"}  # nothing is pickled


@pytest.mark.parametrize("texts", [TEXTS, ("so",)])
def test_a_tokenizer_of_another_model_is_refused(texts, tmp_path):
    classifier = made(tmp_path, vocab_size=5)  # the tokenizer has 13 tokens
    rows = [Row(Utterance(text, text), "joy") for text in texts]
    if texts == TEXTS:
        with pytest.raises(ModelError, match="token 8, but the model knows 5 tokens"):
            classifier.items(rows, "train", augmented=True)
    else:
        assert classifier.items(rows, "train", augmented=True)
        classifier.tokenizer.pad_token = "glad"  # which is token 6
        with pytest.raises(ModelError, match="token 6, but the model knows 5 tokens"):
            classifier.items(rows, "train", augmented=True)


def test_probabilities_come_by_uid(tmp_path):
    classifier = made(tmp_path)
    classifier.items_per_pass = 4
    found = dict(classifier.probabilities(ROWS, "test"))
    expected = scored(classifier, ROWS).double().softmax(1)
    assert list(found) == [row.utterance.uid for row in ROWS]
    np.testing.assert_allclose(list(found.values()), expected, atol=1e-5)


@pytest.fixture
def passes(tmp_path, monkeypatch):
    """The texts of every call of the encoder; the cache is this test's own."""
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "cache"))
    seen = []
    extract = encoder.extract

    def counted(model, rows, **arguments):
        seen.append(len(rows))
        return extract(model, rows, **arguments)

    monkeypatch.setattr(encoder, "extract", counted)
    return seen


@each_pooling
def test_features_and_probabilities_are_computed_once(pooling, tmp_path, passes):
    classifier = made(tmp_path, pooling)
    first = classifier.encode(ROWS, "train")
    again = classifier.encode(ROWS, "train")
    assert passes == [6]
    assert classifier.encoded == 6
    assert first.features.shape == (6, {"first": 64, "mean": 16}[pooling])
    assert torch.equal(first.features, again.features)
    assert torch.equal(first.scores, again.scores)
    expected = scored(classifier, ROWS).softmax(1)
    torch.testing.assert_close(first.scores, expected, atol=1e-5, rtol=1e-4)


def test_other_texts_other_weights_and_another_pooling_are_computed_anew(tmp_path, passes):
    classifier = made(tmp_path)
    classifier.encode(ROWS, "train")
    classifier.encode(ROWS[:4], "train")
    other = (Row(Utterance("row-0", "so glad"), "joy"), *ROWS[1:])
    classifier.encode(other, "train")
    assert passes == [6, 4, 6]
    with torch.no_grad():
        classifier.model.output.bias[0].add_(1)
    classifier.encode(ROWS, "train")
    assert passes == [6, 4, 6, 6]


def test_features_need_no_label(tmp_path, passes):
    classifier = made(tmp_path)
    unscored = tuple(Row(row.utterance, "") for row in ROWS)
    assert torch.equal(
        classifier.encode(unscored, "dev").features, classifier.encode(ROWS, "dev").features
    )


def test_facts_count_the_texts_that_lost_their_end(tmp_path):
    classifier = made(tmp_path)
    exactly = Row(Utterance("full", "so " * 10), "joy")  # with [CLS] and [SEP] twelve tokens
    classifier.items((*ROWS, exactly), "train", augmented=False)
    facts = classifier.facts()
    assert facts["texts_cut"] == {"train": 1}
    assert facts["encoder_parameters"] == sum(
        p.numel() for p in classifier.model.encoder.parameters()
    )
    json.dumps(facts)


def test_damage_is_told(tmp_path):
    classifier = made(tmp_path)
    run = tmp_path / "adapter"
    run.mkdir()
    with pytest.raises(ModelError, match="its encoder cannot be read"):
        encoder_task.load(classifier.method, EXPERIMENT, run)
    classifier.save(run)
    with pytest.raises(ModelError, match="does not fit the network"):
        encoder_task.load(method(tmp_path, "mean"), EXPERIMENT, run)
    (run / storage.CLASSIFIER).unlink()
    with pytest.raises(ModelError, match="no such file"):
        encoder_task.load(classifier.method, EXPERIMENT, run)
