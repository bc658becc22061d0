"""Specialised models by their kind: made new, read back, or opened from a run to build on."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llm_emo import runs
from llm_emo.baselines.classifier import Classifier
from llm_emo.errors import ModelError, RunError
from llm_emo.experiment import BaselineExperiment
from llm_emo.types import Row, Split

MODULES = {
    "majority": "floor",
    "linear": "floor",
    "text_cnn": "text_cnn_task",
    "encoder": "encoder_task",
    "roberta_cnn_lstm": "roberta_cnn_lstm_task",
    "ilt": "speech_task",
    "cat": "speech_task",
    "speech_encoder": "speech_encoder_task",
    "fusion": "fusion_task",
}
"""The module of each kind; read when it is used, because some load libraries for sound."""


class Predictor(Protocol):
    """What predictions are made with."""

    def probabilities(self, rows: Sequence[Row], split: Split) -> Iterator[tuple[str, list[float]]]:
        """Yield uid and class probabilities of every row of a split."""
        ...


def _module(experiment: BaselineExperiment) -> Any:
    return importlib.import_module(f"llm_emo.baselines.{MODULES[experiment.recipe.method.kind]}")


def create(experiment: BaselineExperiment) -> Any:
    """Return a new model of the recipe's method: a `Classifier`, or a fitted floor."""
    return _module(experiment).create(experiment.recipe.method, experiment)


def load(experiment: BaselineExperiment, folder: Path) -> Predictor:
    """Read what a run of the recipe has learned.

    Raises:
        ModelError: the folder is damaged, or belongs to other settings.
    """
    loaded: Predictor = _module(experiment).load(experiment.recipe.method, experiment, folder)
    return loaded


@dataclass(frozen=True)
class Opened:
    """A finished run that another recipe builds on."""

    run: runs.Run
    experiment: BaselineExperiment
    classifier: Classifier
    learned: str
    """`runs.folder_sum` of what it was read from."""


def open_run(folder: str, experiment: BaselineExperiment) -> Opened:
    """Open the finished run that a recipe names, for its features and scores.

    Raises:
        RunError: there is no such run, it has not finished, or it parts other rows.
        ModelError: it is no specialised model, or gives no features.
    """
    run, below = find_run(folder, experiment)
    learned = runs.folder_sum(run.adapter)
    classifier = load(below, run.adapter)
    if not isinstance(classifier, Classifier):
        raise ModelError(
            f"{folder}: method {below.recipe.method.kind} gives no features to build on"
        )
    return Opened(run, below, classifier, learned)


def find_run(folder: str, experiment: BaselineExperiment) -> tuple[runs.Run, BaselineExperiment]:
    """Return the finished run that a recipe names, and its experiment; no model is read.

    Its rows must be parted as those of `experiment` are: a network over features that have seen its
    dev or test rows would be measured on what it knows. A limit may differ: fewer training rows
    below are a weaker encoder, and no leak.

    Raises:
        RunError: there is no such run, it has not finished, or it parts other rows.
        ModelError: it is no specialised model.
    """
    from llm_emo.opening import from_run

    path = Path(folder)
    if not runs.is_run(path):
        raise RunError(
            f"{folder}: no run folder, and method {experiment.recipe.method.kind} builds on it; "
            f"train it first: `llm-emo train RECIPE -o {folder}`"
        )
    run = runs.Run(path)
    run.require_finished()
    below = from_run(run, [], experiment.root)
    if not isinstance(below, BaselineExperiment):
        raise ModelError(f"{folder}: a run of an LLM; expected one of a specialised model")
    for what, own, theirs in (
        ("protocol", experiment.protocol.name, below.protocol.name),
        ("fold", experiment.recipe.data.fold, below.recipe.data.fold),
        ("seed", experiment.recipe.seed, below.recipe.seed),
        ("rows", _rows(experiment), _rows(below)),
    ):
        if own != theirs:
            raise RunError(
                f"{folder}: was trained under another {what}"
                + (f" ({theirs}; expected {own})" if what != "rows" else "")
                + "; train it again as this recipe parts its rows"
            )
    return run, below


def _rows(experiment: BaselineExperiment) -> list[list[str]]:
    return [
        [row.utterance.uid for row in getattr(experiment.splits, split)]
        for split in ("train", "dev", "test")
    ]
