"""The convolution over word vectors as the program trains and measures it (paper 001).

Texts become words by `tweets.words`, on every corpus: the report's order of steps is harmless to
sentences without tags and emojis, and one way leaves nothing to choose on dev. The vocabulary is
that of the training rows, so a word of dev or test that they lack is unknown even where the
pre-trained vectors have it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_emo.baselines import storage, tweets, vectors
from llm_emo.baselines.classifier import Classifier, Encoding, Item
from llm_emo.baselines.kinds import TextCnn as Method
from llm_emo.baselines.text_cnn import TextCnn, pad
from llm_emo.baselines.vectors import UNKNOWN, Vocabulary
from llm_emo.errors import ModelError, ProtocolError
from llm_emo.machine import writing
from llm_emo.types import Row, Split

if TYPE_CHECKING:
    from llm_emo.experiment import BaselineExperiment

WEIGHTS, VOCABULARY = "model.safetensors", "vocabulary.json"


class TextCnnClassifier(Classifier):
    """Rows to words, words to class scores.

    Args:
        names: the protocol's classes, C of them.
        model: of as many ids as the vocabulary has.
        vocabulary: the words of the training rows.
        found: how many of them started from a pre-trained vector.
        unknown: share of the words of the dev texts that the vocabulary lacks.
    """

    model: TextCnn

    def __init__(
        self,
        names: Sequence[str],
        model: TextCnn,
        vocabulary: Vocabulary,
        *,
        found: int,
        unknown: float,
    ) -> None:
        super().__init__(names, model)
        self.vocabulary, self.found, self.unknown = vocabulary, found, unknown

    def items(self, rows: Sequence[Row], split: Split, *, augmented: bool) -> list[Item]:
        """Return one item a row, whose inputs are the ids of its words; no text is augmented."""
        return [
            Item(ids, (self.names.index(row.gold),), (row.utterance.uid,))
            for ids, row in zip(self._ids(rows), rows, strict=True)
        ]

    def _ids(self, rows: Sequence[Row]) -> list[list[int]]:
        return [self.vocabulary.encode(tweets.words(row.utterance.text)) for row in rows]

    def batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return `ids`, shape (B, L), padded on the right."""
        return {"ids": pad([item.inputs for item in items])}

    def scores(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return class scores, shape (B, C)."""
        scores: Tensor = model(batch["ids"])
        return scores

    def save(self, folder: Path) -> None:
        """Write the weights, and the vocabulary with what is known of it."""
        storage.save_weights(folder / WEIGHTS, self.model)
        rest = {
            "dimensions": self.model.embedding.embedding_dim,
            "vectors_found": self.found,
            "unknown_dev_words": self.unknown,
            "words": self.vocabulary.words,
        }
        path = folder / VOCABULARY
        with writing(path, "make room, or name another folder"):
            path.write_text(json.dumps(rest) + "\n", "utf-8")

    def facts(self) -> dict[str, Any]:
        """Return the vocabulary's size, and how much of it, and of dev, is known."""
        words = len(self.vocabulary.words)
        return {
            "vocabulary": words,
            "vector_dimensions": self.model.embedding.embedding_dim,
            "vectors_found": self.found,
            "vectors_found_share": self.found / words,
            "unknown_dev_words_share": self.unknown,
        }

    def encode(self, rows: Sequence[Row], split: Split) -> Encoding:
        """Return pooled features, shape (N, filters of all sizes), and probabilities, (N, C).

        Only the texts are read, so these may be rows that the protocol does not score.
        """
        self.model.eval()
        device = next(self.model.parameters()).device
        texts, features, shares = self._ids(rows), [], []
        with torch.inference_mode():
            for start in range(0, len(texts), _ROWS_PER_PASS):
                ids = pad(texts[start : start + _ROWS_PER_PASS]).to(device)
                features.append(self.model.features(ids))
                shares.append(self.model.output(features[-1]).softmax(1))
        return Encoding(torch.cat(features).cpu(), torch.cat(shares).cpu())


_ROWS_PER_PASS = 256


def create(method: Method, experiment: "BaselineExperiment") -> TextCnnClassifier:
    """Return a new network over the words of the training rows.

    The torch seed decides convolution and output; the recipe's, vectors of words that have none.

    Raises:
        JobFailed: the named vectors cannot be fetched.
        ModelError: there is no such file of vectors, it is malformed, or it has none of the words.
        ProtocolError: no word occurs often enough.
    """
    texts = [tweets.words(row.utterance.text) for row in experiment.rows("train")]
    vocabulary = Vocabulary.of(texts, min_count=method.min_count)
    if not vocabulary.words:
        raise ProtocolError(
            f"no word occurs {method.min_count} times in the {len(texts)} training texts; lower "
            "method.min_count"
        )
    known = vectors.named(method.vectors, vocabulary.words)
    start = vectors.starting(vocabulary, known, seed=experiment.recipe.seed)
    names = experiment.labels.names
    model = _network(method, vocabulary, start.vectors.shape[1], len(names))
    model.start_from(torch.from_numpy(start.vectors))
    dev = [tweets.words(row.utterance.text) for row in experiment.rows("dev")]
    unknown = _unknown(vocabulary, dev)
    return TextCnnClassifier(names, model, vocabulary, found=start.found, unknown=unknown)


def load(method: Method, experiment: "BaselineExperiment", folder: Path) -> TextCnnClassifier:
    """Return what `save` wrote; no vectors are read or fetched.

    Raises:
        ModelError: a file is absent or damaged, or of other settings.
    """
    path = folder / VOCABULARY
    try:
        rest = json.loads(path.read_text("utf-8"))
        vocabulary = Vocabulary(tuple(rest["words"]))
        dimensions = int(rest["dimensions"])
        found, unknown = int(rest["vectors_found"]), float(rest["unknown_dev_words"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: the vocabulary cannot be read ({type(error).__name__}: {error}); train it "
            "again"
        ) from error
    names = experiment.labels.names
    model = _network(method, vocabulary, dimensions, len(names))
    storage.load_weights(folder / WEIGHTS, model)
    return TextCnnClassifier(names, model, vocabulary, found=found, unknown=unknown)


def _network(method: Method, vocabulary: Vocabulary, dimensions: int, classes: int) -> TextCnn:
    return TextCnn(method.network, words=len(vocabulary), dimensions=dimensions, classes=classes)


def _unknown(vocabulary: Vocabulary, texts: Sequence[Sequence[str]]) -> float:
    """Return the share of the words of some texts that the vocabulary lacks; 0 without words."""
    ids = [id_ for text in texts for id_ in vocabulary.encode(text)]
    return ids.count(UNKNOWN) / max(1, len(ids))
