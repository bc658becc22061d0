"""TF-IDF with logistic regression, and the majority class."""

import numpy as np
import pytest

from llm_emo.baselines.linear import SETTINGS, WEIGHTS, Linear, Majority
from llm_emo.baselines.settings import LinearSettings
from llm_emo.errors import ModelError, ProtocolError

NAMES = ("anger", "joy", "fear")
WORD = LinearSettings(unit="word", ngrams=(1, 2), min_texts=1, strength=10.0, balanced=False)
CHARACTER = LinearSettings(
    unit="character", ngrams=(1, 3), min_texts=1, strength=10.0, balanced=True
)
PLACES = ["train", "boat", "bus", "road", "house", "tree", "lamp", "door"]
BEGINNINGS = [("rage", "!"), ("glee", "."), ("awe", "?"), ("glee", "!")]
TEXTS = [f"{word} {place}{end}" for word, end in BEGINNINGS for place in PLACES]
LABELS = ["anger"] * 8 + ["joy"] * 8 + ["fear"] * 8 + ["joy"] * 8
CHINESE = ["我很开心", "真让人生气", "我好害怕", "太高兴了", "气死我了", "吓死我了"]
both = pytest.mark.parametrize("settings", [WORD, CHARACTER], ids=["word", "character"])


@both
def test_it_overfits_32_rows(settings):
    made = Linear.fit(TEXTS, LABELS, NAMES, settings)
    found = made.probabilities(TEXTS)
    assert found.shape == (32, 3)
    assert found.sum(1) == pytest.approx(np.ones(32))
    assert [NAMES[place] for place in found.argmax(1)] == LABELS


@both
def test_saved_and_loaded_it_gives_the_same_bits(settings, tmp_path):
    made = Linear.fit(TEXTS, LABELS, NAMES, settings)
    made.save(tmp_path)
    again = Linear.load(tmp_path)
    texts = [*TEXTS, "unseen words", "", "glee rage 😂"]
    assert np.array_equal(again.probabilities(texts), made.probabilities(texts))
    assert (again.names, again.settings) == (NAMES, settings)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, SETTINGS}


def test_two_classes_are_saved_and_loaded_too(tmp_path):
    made = Linear.fit(TEXTS[:16], LABELS[:16], NAMES[:2], WORD)
    made.save(tmp_path)
    found = Linear.load(tmp_path).probabilities(TEXTS)
    assert found.shape == (32, 2)
    assert np.array_equal(found, made.probabilities(TEXTS))


def test_a_class_that_training_never_saw_has_probability_zero(tmp_path):
    made = Linear.fit(TEXTS[:16], LABELS[:16], ("fear", "anger", "joy"), WORD)
    made.save(tmp_path)
    for model in (made, Linear.load(tmp_path)):
        found = model.probabilities(["rage bus"])
        assert found[0, 0] == 0
        assert found[0].argmax() == 1


def test_marks_and_emojis_are_words():
    made = Linear.fit(["yes!", "yes 😂", "yes"], ["anger", "joy", "fear"], NAMES, WORD)
    assert {"!", "😂"} <= set(made.vectorizer.vocabulary_)


def test_chinese_is_read_by_characters():
    labels = ["joy", "anger", "fear"] * 2
    made = Linear.fit(CHINESE, labels, NAMES, CHARACTER)
    assert NAMES[made.probabilities(["他很生气"])[0].argmax()] == "anger"


def test_balanced_classes_help_the_rare_one():
    texts = ["same"] * 20
    labels = ["joy"] * 18 + ["anger"] * 2
    plain, balanced = (
        Linear.fit(
            texts,
            labels,
            NAMES[:2],
            LinearSettings(unit="word", ngrams=(1, 1), min_texts=1, strength=1.0, balanced=choice),
        )
        for choice in (False, True)
    )
    assert plain.probabilities(["same"])[0, 0] < 0.2
    assert balanced.probabilities(["same"])[0, 0] == pytest.approx(0.5, abs=0.02)


def test_no_texts_have_no_probabilities():
    assert Linear.fit(TEXTS, LABELS, NAMES, WORD).probabilities([]).shape == (0, 3)


def test_what_cannot_be_learnt_from_is_refused():
    with pytest.raises(ProtocolError, match="all joy"):
        Linear.fit(["a", "b"], ["joy", "joy"], NAMES, WORD)
    with pytest.raises(ProtocolError, match="min_texts"):
        Linear.fit(
            ["a", "b"],
            ["joy", "fear"],
            NAMES,
            LinearSettings(unit="word", ngrams=(1, 1), min_texts=2, strength=1.0, balanced=False),
        )
    with pytest.raises(ProtocolError, match="did you mean 'joy'"):
        Linear.fit(["a", "b"], ["jo", "fear"], NAMES, WORD)


@pytest.mark.parametrize("name", [WEIGHTS, SETTINGS])
def test_a_damaged_model_is_refused(name, tmp_path):
    Linear.fit(TEXTS, LABELS, NAMES, WORD).save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    with pytest.raises(ModelError, match="train it again"):
        Linear.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ModelError, match="train it again"):
        Linear.load(tmp_path)


def test_files_of_two_models_do_not_mix(tmp_path):
    for name, texts in (("one", TEXTS), ("two", CHINESE)):
        (tmp_path / name).mkdir()
        labels = LABELS if name == "one" else ["joy", "anger", "fear"] * 2
        Linear.fit(texts, labels, NAMES, WORD).save(tmp_path / name)
    (tmp_path / "two" / WEIGHTS).replace(tmp_path / "one" / WEIGHTS)
    with pytest.raises(ModelError, match="train it again"):
        Linear.load(tmp_path / "one")


def test_the_majority_is_the_most_frequent_class_and_of_equal_ones_the_first():
    made = Majority.fit(["joy", "fear", "joy", "anger"], NAMES)
    assert made.label == "joy"
    assert made.probabilities(2).tolist() == [[0.25, 0.5, 0.25]] * 2
    assert Majority.fit(["joy", "anger"], NAMES).label == "anger"


@pytest.mark.parametrize(
    "wrong",
    [{"ngrams": (0, 1)}, {"ngrams": (2, 1)}, {"min_texts": 0}, {"strength": 0.0}, {"unit": "line"}],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LinearSettings.model_validate(WORD.model_dump() | wrong)
