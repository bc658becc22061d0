"""The floor under every table: TF-IDF with logistic regression, and the majority class.

A second of work on one core. No torch here; scikit-learn is loaded when a model is made. What no
recipe can state: an n-gram that occurs n times in a text counts 1 + ln n there, and the fit ends
after 1,000 iterations at the latest.
Probabilities have the protocol's label order; a class that training never saw has 0.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from llm_emo.baselines.settings import LinearSettings
from llm_emo.errors import ModelError, ProtocolError, nearest

Floats = np.typing.NDArray[np.float64]

WEIGHTS, SETTINGS = "linear.safetensors", "linear.json"

# A word, or a single mark that is neither letter nor space: "!" and emojis carry emotion.
_WORD = r"(?u)\w+|[^\w\s]"


@dataclass(frozen=True)
class Majority:
    """Says the most frequent class of training to everything, with the classes' shares."""

    names: tuple[str, ...]
    shares: tuple[float, ...]

    @classmethod
    def fit(cls, labels: Sequence[str], names: Sequence[str]) -> "Majority":
        """Count `labels`, each of which is one of `names`.

        >>> Majority.fit(["joy", "anger", "joy"], ["anger", "joy", "fear"]).label
        'joy'
        """
        _require_known(labels, names)
        counts = Counter(labels)
        return cls(tuple(names), tuple(counts[name] / len(labels) for name in names))

    @property
    def label(self) -> str:
        """The most frequent class; of equally frequent ones the first."""
        return self.names[int(np.argmax(self.shares))]

    def probabilities(self, rows: int) -> Floats:
        """Return the shares for every row, shape (rows, C)."""
        return np.tile(np.array(self.shares), (rows, 1))


@dataclass(frozen=True)
class Linear:
    """TF-IDF and logistic regression, fitted."""

    names: tuple[str, ...]
    settings: LinearSettings
    vectorizer: Any
    classifier: Any

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        labels: Sequence[str],
        names: Sequence[str],
        settings: LinearSettings,
    ) -> "Linear":
        """Fit to texts and their labels; the same texts give the same model.

        Args:
            texts: of training, N.
            labels: of the texts.
            names: all labels of the protocol, in its order, C.
            settings: n-grams and penalty.

        Raises:
            ProtocolError: fewer than two classes have rows, or no n-gram is left.
        """
        from sklearn.linear_model import LogisticRegression

        _require_known(labels, names)
        if len(set(labels)) < 2:
            raise ProtocolError(
                f"the training rows are all {', '.join(set(labels)) or 'absent'}; a classifier "
                "needs two classes"
            )
        vectorizer = _vectorizer(settings, None)
        try:
            features = vectorizer.fit_transform(texts)
        except ValueError as error:  # scikit-learn's word for "no n-gram is left"
            raise ProtocolError(
                f"no n-gram occurs in {settings.min_texts} of the {len(texts)} training texts "
                f"({error}); lower min_texts"
            ) from error
        classifier = LogisticRegression(
            C=settings.strength,
            class_weight="balanced" if settings.balanced else None,
            max_iter=1000,
        )
        classifier.fit(features, [names.index(label) for label in labels])
        return cls(tuple(names), settings, vectorizer, classifier)

    def probabilities(self, texts: Sequence[str]) -> Floats:
        """Return P(label | text), shape (N, C)."""
        found = np.zeros((len(texts), len(self.names)))
        if texts:
            features = self.vectorizer.transform(texts)
            found[:, self.classifier.classes_] = self.classifier.predict_proba(features)
        return found

    def save(self, folder: Path) -> None:
        """Write vocabulary and settings as JSON, numbers as safetensors; nothing is pickled."""
        vocabulary = sorted(self.vectorizer.vocabulary_, key=self.vectorizer.vocabulary_.get)
        save_file(
            {
                "idf": self.vectorizer.idf_,
                # safetensors writes the memory as it lies, and scikit-learn's lies by columns.
                "coefficients": np.ascontiguousarray(self.classifier.coef_),
                "intercepts": self.classifier.intercept_,
                "classes": np.asarray(self.classifier.classes_, dtype=np.int64),
            },
            folder / WEIGHTS,
        )
        rest = {
            "names": self.names,
            "settings": self.settings.model_dump(),
            "vocabulary": vocabulary,
        }
        (folder / SETTINGS).write_text(json.dumps(rest), "utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Linear":
        """Read what `save` wrote.

        Raises:
            ModelError: a file is absent or damaged.
        """
        from sklearn.linear_model import LogisticRegression

        try:
            rest = json.loads((folder / SETTINGS).read_text("utf-8"))
            settings = LinearSettings.model_validate(rest["settings"])
            numbers = load_file(folder / WEIGHTS)
            vectorizer = _vectorizer(settings, rest["vocabulary"])
            vectorizer.idf_ = numbers["idf"]
            classifier = LogisticRegression()
            classifier.coef_ = numbers["coefficients"]
            classifier.intercept_ = numbers["intercepts"]
            classifier.classes_ = numbers["classes"]
            names = tuple(rest["names"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"{folder}: the linear model cannot be read ({type(error).__name__}: {error}); "
                "train it again"
            ) from error
        return cls(names, settings, vectorizer, classifier)


def _vectorizer(settings: LinearSettings, vocabulary: Sequence[str] | None) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        analyzer="word" if settings.unit == "word" else "char",
        token_pattern=_WORD if settings.unit == "word" else None,
        ngram_range=settings.ngrams,
        min_df=settings.min_texts,
        sublinear_tf=True,
        vocabulary=vocabulary,
    )


def _require_known(labels: Sequence[str], names: Sequence[str]) -> None:
    for label in set(labels):
        if label not in names:
            raise ProtocolError(
                f"label {label!r} is not one of the protocol's; {nearest(label, names)}"
            )
