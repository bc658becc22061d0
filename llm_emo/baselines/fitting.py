"""Specialised models in the program's own training loop."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import set_seed

from llm_emo import methods, recipes
from llm_emo.baselines import imbalance, opening, storage
from llm_emo.baselines.classifier import Classifier, Item
from llm_emo.baselines.settings import Imbalance, Resampling
from llm_emo.errors import JobFailed, RecipeError
from llm_emo.experiment import BaselineExperiment
from llm_emo.machine import processes, say
from llm_emo.steps import Steps
from llm_emo.training import Batch, Size
from llm_emo.types import IGNORED
from llm_emo.workflow import Fitted, Job, measured

LABELS = "labels"
"""The key of a batch under which the class ids stand; shape (N,)."""


class Classes:
    """A `training.Task`: the classes of rows.

    Args:
        classifier: what learns.
        option: what is done about rare classes.
        counts: training rows of every class, shape (C,).
        spare: an item for passes that have none.
    """

    def __init__(
        self, classifier: Classifier, option: Imbalance | None, counts: Tensor, spare: Item
    ) -> None:
        self.classifier, self.option, self.counts, self.spare = classifier, option, counts, spare

    def collate(self, rows: Sequence[Item]) -> Batch:
        """Batch items; without any, one whose labels count for nothing keeps processes in step."""
        labels = [label for item in rows for label in item.labels]
        if not rows:
            rows, labels = [self.spare], [IGNORED] * len(self.spare.labels)
        return {**self.classifier.batch(rows), LABELS: torch.tensor(labels)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss summed over the rows that have a label, shape ()."""
        inputs = {name: value for name, value in batch.items() if name != LABELS}
        scores, labels = self.classifier.scores(model, inputs), batch[LABELS]
        if (there := labels != IGNORED).all():
            return imbalance.row_losses(self.option, scores, labels, self.counts).sum()
        losses = imbalance.row_losses(self.option, scores[there], labels[there], self.counts)
        # A pass without a label still needs a way back to every parameter.
        return losses.sum() + 0 * scores.sum()

    def size(self, batch: Batch) -> Size:
        """Count rows; there are no tokens that could be spared."""
        rows = int((batch[LABELS] != IGNORED).sum())
        return Size(targets=rows, tokens_run=0, tokens_saved=0, examples=rows)

    def save(self, folder: Path, model: nn.Module) -> None:
        """Write the whole network, running statistics among it."""
        storage.save_weights(folder / "model.safetensors", model)

    def load(self, folder: Path, model: nn.Module) -> None:
        """Read what `save` wrote."""
        storage.load_weights(folder / "model.safetensors", model)

    def idle(self, model: nn.Module) -> list[str]:
        """Return nothing: these networks start from random weights."""
        return []


def fit(experiment: BaselineExperiment) -> Fitted:
    """Fit what needs no steps.

    Raises:
        ProtocolError: the training rows hold one class only, or no n-gram.
    """
    started = time.perf_counter()
    floor = opening.create(experiment)
    seconds = time.perf_counter() - started

    def keep(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        floor.save(folder)

    rows = len(experiment.rows("train"))
    return Fitted(rows, floor.parameters, seconds, keep, floor.facts())


def prepare(experiment: BaselineExperiment, settings: recipes.Train) -> Job:
    """Make the classifier and its items: all that can fail before there is a run folder.

    Raises:
        ModelError: a part of the model cannot be had or used.
        RecipeError: several processes, where batch normalisation sees a step's rows together.
    """
    recipe, state = experiment.recipe, processes()
    if state.num_processes > 1 and recipe.method.whole_batches:
        raise RecipeError(
            f"method {recipe.method.kind} normalises over the rows of a step, which cannot be "
            "parted between processes; start it without `accelerate launch`"
        )
    set_seed(recipe.seed)
    classifier = opening.create(experiment)
    classifier.model.to(state.device)
    say(f"{recipe.method.kind} on {state.device}: {methods.count_parameters(classifier.model)}")
    items = classifier.items(experiment.rows("train"), "train", augmented=True)
    dev = classifier.items(experiment.rows("dev"), "dev", augmented=True)
    labels = np.array([label for item in items for label in item.labels if label != IGNORED])
    counts = imbalance.class_counts(torch.from_numpy(labels), len(classifier.names))
    option = settings.imbalance
    order: Callable[[int], Sequence[int]] | None = None
    if isinstance(option, Resampling):

        def order(epoch: int) -> Sequence[int]:
            return imbalance.epoch_order(option, labels, seed=recipe.seed, epoch=epoch)

    steps = Steps(
        items, settings, seed=recipe.seed, order=order,
        rank=state.process_index, world=state.num_processes,
    )  # fmt: skip

    def keep(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        classifier.save(folder)

    return Job(
        experiment,
        classifier.model,
        items,
        steps,
        settings,
        Classes(classifier, option, counts, items[0]),
        _Dev(experiment, classifier, dev).measure,
        keep,
        {
            "dtype": "float32",
            "training_rows": len(experiment.rows("train")),
            "training_labels": counts.tolist(),
            **classifier.facts(),
        },
        classifier.learned,
    )


class _Dev:
    """The dev split, copies made for validation among it, in shares by all processes."""

    def __init__(
        self, experiment: BaselineExperiment, classifier: Classifier, items: Sequence[Item]
    ) -> None:
        self.experiment, self.classifier, self.items = experiment, classifier, items

    def measure(self, model: nn.Module) -> Mapping[str, float]:
        """Return the protocol's metrics on dev."""
        state, names = processes(), self.classifier.names
        share = self.items[state.process_index :: state.num_processes]
        own: list[tuple[str, str, str | None]] = [
            (str(uid), names[label], names[shares.index(max(shares))])
            for uid, label, shares in self.classifier.said(model, share)
            if label != IGNORED
        ]
        rows = gather_object(own) if state.num_processes > 1 else own
        if len(rows) != sum(label != IGNORED for item in self.items for label in item.labels):
            raise JobFailed("dev rows were lost or doubled between processes")
        return measured(rows, self.experiment.protocol)
