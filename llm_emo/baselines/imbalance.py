"""Losses and row orders for corpora with rare classes.

Everything works on `logits`, one score per class, shape (B, C), on `labels`, shape (B,), and on
`counts`, the training rows of every class, shape (C,). A class without training rows is
counted as one row, so that nothing is divided by zero. `llm_emo.llm_imbalance` says what the same
remedies are for a model that writes its labels.

Every loss is one number a row, and the loss of a batch is their plain mean over the rows of the
global batch. Weights have mean 1 over the training rows; dividing by the rows rather than by
the batch's own weights keeps the gradient independent of how a batch is cut into micro-batches.
"""

import numpy as np
import torch
from torch import Tensor, nn

from llm_emo.baselines.settings import (
    ClassWeights,
    Focal,
    Imbalance,
    LogitAdjustment,
    Resampling,
)


def class_counts(labels: Tensor, classes: int) -> Tensor:
    """Return how many of `labels`, shape (N,), each class has; shape (C,)."""
    return torch.bincount(labels, minlength=classes)


def class_weights(counts: Tensor, strength: float) -> Tensor:
    """Return the weight of a row of each class, shape (C,): n_c ** -strength, of mean 1 over rows.

    With strength 1 that is n / (C' n_c) for the C' classes that have rows.
    """
    raw = counts.clamp(min=1).double() ** -strength
    scale = counts.sum() / (counts * raw).sum().clamp(min=1e-12)
    return (raw * scale).float()


def log_prior(counts: Tensor) -> Tensor:
    """Return the log share of each class in the training rows, in nats; shape (C,)."""
    at_least_one = counts.clamp(min=1).double()
    return (at_least_one / at_least_one.sum()).log().float()


def row_losses(option: Imbalance | None, logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Return the loss of every row, in nats; shape (B,).

    Resampling changes which rows are seen and not their loss, which is plain.

    Args:
        option: what is done about rare classes.
        logits: scores, shape (B, C).
        labels: class ids, shape (B,).
        counts: training rows of every class, shape (C,).
    """
    match option:
        case None | Resampling():
            return _cross_entropy(logits, labels)
        case ClassWeights(strength=strength):
            weights = class_weights(counts, strength).to(logits.device)
            return weights[labels] * _cross_entropy(logits, labels)
        case Focal(gamma=gamma, balanced=balanced):
            losses = focal(logits, labels, gamma)
            if balanced:
                losses = class_weights(counts, 1.0).to(logits.device)[labels] * losses
            return losses
        case LogitAdjustment(tau=tau):
            prior = log_prior(counts).to(logits.device)
            return _cross_entropy(logits + tau * prior, labels)


def focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Return (1 - p) ** gamma times -log p of the right class; shape (B,)."""
    return focused(-_cross_entropy(logits, labels), gamma)


def focused(log_p: Tensor, gamma: float) -> Tensor:
    """Return (1 - p) ** gamma times -log p, of the same shape.

    Args:
        log_p: log-probabilities of what is right, in nats.
        gamma: how much less counts what is right already.
    """
    # 1 - exp(log p) loses all digits where p is near 1; and a power below 1 has no gradient at 0.
    missing = (-torch.expm1(log_p)).clamp(min=1e-12)
    return -(missing**gamma) * log_p


def epoch_order(
    option: Imbalance | None, labels: np.typing.NDArray[np.int64], *, seed: int, epoch: int
) -> list[int]:
    """Return the rows of an epoch, in order: a function of seed and epoch alone.

    Without resampling it is a permutation. With it, every class fills its share of as many rows
    by passing through its own rows again and again, each time in a new order; so rows of a class
    occur equally often or once more, and no step is longer than without.

    Args:
        option: what is done about rare classes.
        labels: class id of every training row, shape (N,).
        seed: of the run.
        epoch: from 0.
    """
    generator = np.random.default_rng((seed, epoch))
    if not isinstance(option, Resampling):
        return [int(row) for row in generator.permutation(len(labels))]
    classes, counts = np.unique(labels, return_counts=True)
    share = option.strength / len(classes) + (1 - option.strength) * counts / len(labels)
    drawn: list[int] = []
    for label, quota in zip(classes, _whole(share * len(labels)), strict=True):
        own = np.flatnonzero(labels == label)
        rounds = -(-int(quota) // len(own))
        passes = [generator.permutation(own) for _ in range(rounds)]
        drawn += np.concatenate([*passes, own[:0]])[: int(quota)].tolist()
    return [drawn[place] for place in generator.permutation(len(drawn))]


def _whole(quotas: np.typing.NDArray[np.float64]) -> np.typing.NDArray[np.int64]:
    """Round quotas so that their sum stays; the largest fractions are rounded up."""
    floors = np.floor(quotas + 1e-9).astype(np.int64)
    missing = round(float(quotas.sum())) - int(floors.sum())
    floors[np.argsort(floors - quotas, kind="stable")[:missing]] += 1
    return floors


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    # Sums over classes lose digits in half precision.
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(precise, labels, reduction="none")
