"""What every specialised model gives the program, so that it is trained and measured as an LLM is.

A `Classifier` turns rows into items, items into a batch, a batch into one row of class scores per
label; training, checkpoints, predictions and reports are the program's own.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_emo.types import Row, Split


@dataclass(frozen=True)
class Item:
    """What a network reads at once: one row, or the turns of a dialogue.

    `labels` and `uids` have an entry for each vector of class scores that it gives; a turn that
    the protocol does not score has `types.IGNORED` and None.
    """

    inputs: Any
    labels: tuple[int, ...]
    uids: tuple[str | None, ...]


@dataclass(frozen=True)
class Encoding:
    """What a trained classifier says of N rows: features (N, H), and class scores (N, C)."""

    features: Tensor
    scores: Tensor


@contextlib.contextmanager
def lent_gpu(model: nn.Module) -> Iterator[None]:
    """Run a model that is not trained on a GPU, where there is one; afterwards it is on the CPU."""
    if torch.cuda.is_available():
        model.cuda()
    try:
        yield
    finally:
        model.cpu()  # the memory belongs to what is trained


class Classifier(ABC):
    """A specialised model and how rows reach it.

    Args:
        names: the protocol's classes, C of them.
        model: float32.
    """

    items_per_pass = 64
    """Items that are heard or read together when nothing is learned; 1 where the company of
    others would change what is said of one."""

    def __init__(self, names: Sequence[str], model: nn.Module) -> None:
        self.names, self.model = tuple(names), model

    @abstractmethod
    def items(self, rows: Sequence[Row], split: Split, *, augmented: bool) -> list[Item]:
        """Return the items of a split's rows, in their order.

        Args:
            rows: of one split, all of them where a model reads whole dialogues.
            split: their split.
            augmented: whether copies made for training and its validation are among them.
        """

    @abstractmethod
    def batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return what `scores` takes, on the CPU."""

    @abstractmethod
    def scores(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return class scores, shape (N, C): one row for each label of the items, in order.

        Args:
            model: `self.model`, perhaps wrapped for several processes.
            batch: what `batch` returned, on the model's device.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write everything that `load` needs into an existing folder; nothing is pickled."""

    def facts(self) -> dict[str, Any]:
        """Return what `check` and the run folder say of it beside its parameters."""
        return {}

    def learned(self) -> dict[str, Any]:
        """Return what of the trained parameters people want to read."""
        return {}

    def encode(self, rows: Sequence[Row], split: Split) -> Encoding:
        """Return features and scores of rows, in their order, for a network on top of this one.

        Raises:
            ModelError: this kind has no features to give.
        """
        from llm_emo.errors import ModelError

        raise ModelError(f"{type(self).__name__}: gives no features for another network")

    def said(
        self, model: nn.Module, items: Sequence[Item]
    ) -> Iterator[tuple[str | None, int, list[float]]]:
        """Yield uid, label and class probabilities for each label of the items, in their order.

        Dev is measured by this and predictions are made by it, in passes of `items_per_pass`.

        Args:
            model: `self.model`, perhaps wrapped; left in eval mode.
            items: of one split.
        """
        model.eval()
        device = next(model.parameters()).device
        for start in range(0, len(items), self.items_per_pass):
            some = items[start : start + self.items_per_pass]
            with torch.inference_mode():
                batch = {name: value.to(device) for name, value in self.batch(some).items()}
                shares = self.scores(model, batch).double().softmax(1).tolist()
            uids = [uid for item in some for uid in item.uids]
            labels = [label for item in some for label in item.labels]
            yield from zip(uids, labels, shares, strict=True)

    def probabilities(self, rows: Sequence[Row], split: Split) -> Iterator[tuple[str, list[float]]]:
        """Yield uid and class probabilities of every row, in the items' order."""
        for uid, _, shares in self.said(self.model, self.items(rows, split, augmented=False)):
            if uid is not None:
                yield uid, shares
