"""The floor in a run folder: TF-IDF with logistic regression, and the majority class."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_emo.baselines import kinds
from llm_emo.baselines.linear import Linear, Majority
from llm_emo.errors import ModelError
from llm_emo.experiment import BaselineExperiment
from llm_emo.types import Row, Split

SHARES = "majority.json"


class Floor:
    """A model that is fitted at once."""

    def __init__(self, model: Linear | Majority) -> None:
        self.model = model

    def probabilities(self, rows: Sequence[Row], split: Split) -> Iterator[tuple[str, list[float]]]:
        """Yield uid and class probabilities of every row."""
        if isinstance(self.model, Majority):
            shares = self.model.probabilities(len(rows))
        else:
            shares = self.model.probabilities([row.utterance.text for row in rows])
        for row, share in zip(rows, shares.tolist(), strict=True):
            yield row.utterance.uid, share

    @property
    def parameters(self) -> int:
        """Numbers that were fitted."""
        if isinstance(self.model, Majority):
            return len(self.model.shares)
        return int(self.model.classifier.coef_.size + self.model.classifier.intercept_.size)

    def save(self, folder: Path) -> None:
        """Write what `load` reads; nothing is pickled."""
        if isinstance(self.model, Linear):
            self.model.save(folder)
            return
        content = {"names": self.model.names, "shares": self.model.shares}
        (folder / SHARES).write_text(json.dumps(content), "utf-8")

    def facts(self) -> dict[str, Any]:
        """Return what the run folder says of it."""
        if isinstance(self.model, Majority):
            return {"majority_class": self.model.label}
        return {"ngrams": len(self.model.vectorizer.vocabulary_)}


def create(method: kinds.Linear | kinds.Majority, experiment: BaselineExperiment) -> Floor:
    """Fit to the training rows.

    Raises:
        ProtocolError: they hold one class only, or no n-gram is left.
    """
    rows, names = experiment.rows("train"), experiment.protocol.labels
    gold = [row.gold for row in rows]
    if isinstance(method, kinds.Majority):
        return Floor(Majority.fit(gold, names))
    texts = [row.utterance.text for row in rows]
    return Floor(Linear.fit(texts, gold, names, method.features))


def load(
    method: kinds.Linear | kinds.Majority, experiment: BaselineExperiment, folder: Path
) -> Floor:
    """Read what `Floor.save` wrote.

    Raises:
        ModelError: a file is absent or damaged.
    """
    if isinstance(method, kinds.Linear):
        return Floor(Linear.load(folder))
    try:
        content = json.loads((folder / SHARES).read_text("utf-8"))
        names, shares = tuple(content["names"]), tuple(map(float, content["shares"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / SHARES}: cannot be read ({type(error).__name__}: {error}); train it again"
        ) from error
    return Floor(Majority(names, shares))
