"""Training speed and memory: an optimiser's steps through the trie and over padded rows.

A step is what `llm-emo train` does in one: collate the batch, run it forward and backward (in
passes of so many rows), clip, let AdamW step. All sides share model, adapter, rows, loss and
optimiser; they differ in how a batch is laid out, and in nothing else.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from gpu_check import padded
from gpu_check.turns import Clock, Side, guarded, measure
from llm_emo import recipes
from llm_emo.encoding import Encoded
from llm_emo.methods import count_parameters
from llm_emo.training import answer_loss, collate

Loss = Callable[[Sequence[Encoded], int], Tensor]
"""Of some rows of a batch, over the batch's number of targets; shape ()."""


def targets(rows: Sequence[Encoded]) -> int:
    """Return how many tokens are trained."""
    return sum(len(row.answer) for row in rows)


def trie_tokens(rows: Sequence[Encoded], micro: int) -> int:
    """Return how many tokens the transformer runs for these rows, in passes of `micro`."""
    parts = [rows[start : start + micro] for start in range(0, len(rows), micro)]
    return sum(len(collate(part)["trie"]) for part in parts)


def trie_loss(model: nn.Module) -> Loss:
    """Return the loss as the program computes it."""
    return lambda rows, count: answer_loss(model, collate(rows)) / count


def padded_loss(model: nn.Module, least: int = 0) -> Loss:
    """Return the loss as transformers computes it from padded rows."""
    return lambda rows, count: padded.loss(model, rows, count, least)


def whole(loss: Loss, rows: Sequence[Encoded], micro: int, *, backward: bool) -> Tensor:
    """Return the batch's loss, in passes of at most `micro` rows; with gradients if asked."""
    total = torch.zeros(())
    count = targets(rows)
    for start in range(0, len(rows), micro):
        part = loss(rows[start : start + micro], count)
        if backward:
            part.backward()  # type: ignore[no-untyped-call]
        total = total + part.detach().float().cpu()
    return total


class Steps:
    """Optimiser steps of one side."""

    def __init__(
        self, model: nn.Module, loss: Loss, optimizer: Any, settings: recipes.Train
    ) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.max_grad_norm = settings.max_grad_norm
        self.learned = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, rows: Sequence[Encoded], micro: int) -> Tensor:
        """Do one step."""
        loss = whole(self.loss, rows, micro, backward=True)
        nn.utils.clip_grad_norm_(self.learned, self.max_grad_norm)
        self.optimizer.step()
        self.clean()
        return loss

    def clean(self) -> None:
        """Drop gradients."""
        self.optimizer.zero_grad(set_to_none=True)


def sides(
    model: nn.Module, base: Any, method: recipes.Method, settings: recipes.Train
) -> list[Side]:
    """Return the trie and what it is compared with, sharing one adapter and one optimiser."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    # P-Tuning v2 attends to its prefix inside our attention, padded or not.
    stock = not isinstance(method, recipes.PTuningV2)

    def side(name: str, loss: Loss, count: Callable[[Sequence[Encoded], int], int]) -> Side:
        steps = Steps(model, loss, optimizer, settings)
        own = name == "trie" or not stock
        around = nullcontext if own else lambda: padded.stock_attention(base)
        return Side(name, steps, count, steps.clean, around)

    least = padded.ORIGINAL_WIDTH
    return [
        side("trie", trie_loss(model), trie_tokens),
        side("padded", padded_loss(model), padded.tokens),
        side(
            f"padded to {least}", padded_loss(model, least),
            lambda rows, micro: padded.tokens(rows, micro, least),
        ),
    ]  # fmt: skip


def first_losses(model: nn.Module, rows: Sequence[Encoded]) -> dict[str, Any]:
    """Return one batch's loss on both sides, without dropout: they must train the same thing."""
    found: dict[str, float] = {}

    def run() -> None:
        with torch.no_grad():
            for name, loss in (("trie", trie_loss(model)), ("padded", padded_loss(model))):
                found[name] = float(whole(loss, rows, 4, backward=False))

    model.eval()
    message = guarded(run)
    if message is not None:
        return {"status": "out of memory", "message": message}
    if not all(map(math.isfinite, found.values())):  # JSON has no NaN
        return {"status": "failed", "message": f"losses are not finite: {found}"}
    difference = abs(found["trie"] - found["padded"]) / abs(found["padded"])
    return {"status": "measured", **found, "relative_difference": difference}


def compare(
    model: nn.Module, base: Any, recipe: recipes.Recipe, batches: Sequence[Sequence[Encoded]],
    clock: Clock, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Measure all sides over these batches of one corpus."""
    assert recipe.train is not None
    losses = first_losses(model, batches[0])
    model.train()
    measured = measure(sides(model, base, recipe.method, recipe.train), batches, clock, device)
    return {"first_losses": losses, **measured}


def counted(model: nn.Module) -> dict[str, int]:
    """Return how many parameters there are and how many learn."""
    return asdict(count_parameters(model))
