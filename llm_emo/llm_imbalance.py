"""Remedies for rare classes where the answer is text that a model writes.

Plain training adds up the cross-entropies of the answer tokens and divides by the answer tokens
of the global batch. Each remedy here is a sum too, with its own divisor:

class_weights     every answer token's cross-entropy times the weight of its row's class, divided
                  by the answer tokens. The weights themselves are not divided by: that would make
                  a gradient depend on how a batch is cut into passes.
focal             (1 - p) ** gamma times -log p, where p is the probability of the row's whole
                  answer, divided by the answer tokens. A word of three tokens is right or wrong
                  as one: were its tokens focused one by one, the last, which the first decides,
                  would never count.
logit_adjustment  cross-entropy over log P(answer | prompt) + tau log prior of *all* labels, divided
                  by the rows. Labels are compared with each other, so all of them stand under
                  every prompt, in one trie; what they score is what score mode compares. With
                  tau 0 it is not plain training: only the labels' ratios are learned, and what
                  other texts have of the probability is left as it is.
resampling        plain, on an epoch in which rare classes are drawn more often (`order`).

A row's class is the label whose answer it has; rows, answers and classes are those of one recipe.

Letters: B rows of a pass, C labels, S sequences of a trie (B, or B times C), T answer tokens of
all of them, K nodes where logits are needed.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from llm_emo import training
from llm_emo.baselines import imbalance
from llm_emo.baselines.settings import (
    ClassWeights,
    Focal,
    Imbalance,
    LogitAdjustment,
    Resampling,
)
from llm_emo.encoding import Encoded
from llm_emo.errors import ModelError
from llm_emo.inference import Ids, targets
from llm_emo.training import Batch
from llm_emo.trie import TokenTrie, node_logits
from llm_emo.types import IGNORED


def classes_of(rows: Sequence[Encoded], answers: Sequence[Ids]) -> Tensor:
    """Return the class of every row, shape (N,).

    Args:
        rows: the training rows.
        answers: token ids of every label's answer, with its end token, in label order.

    Raises:
        ModelError: two labels have the same ids, or a row's answer is no label's.
    """
    classes = {answer: number for number, answer in enumerate(answers)}
    if len(classes) < len(answers):
        raise ModelError(
            "the tokenizer writes two labels with the same ids, so that nothing tells them apart; "
            "take other words for them, or another model"
        )
    foreign = next((row for row in rows if row.answer not in classes), None)
    if foreign is not None:
        raise ModelError(
            f"row {foreign.uid}: its answer {list(foreign.answer)} is that of no label; encode "
            "rows and labels with one prompt and tokenizer"
        )
    return torch.tensor([classes[row.answer] for row in rows], dtype=torch.long)


def nodes_at_most(option: Imbalance | None, row: Encoded, answers: Sequence[Ids]) -> int:
    """Return the tokens that a row runs in a pass of its own, which no company adds to."""
    behind = answers if isinstance(option, LogitAdjustment) else [row.answer]
    return len(row.prompt) + sum(len(answer) - 1 for answer in behind)


class RemediedAnswers(training.Answers):
    """A `training.Task`: an LLM learns its answers under a remedy.

    Args:
        option: what is done about rare classes.
        answers: token ids of every label's answer, with its end token, in label order; C of them.
        counts: training rows of every class, shape (C,).
    """

    def __init__(self, option: Imbalance | None, answers: Sequence[Ids], counts: Tensor) -> None:
        self.option, self.answers, self.counts = option, answers, counts

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """Fold the rows of a pass into one trie, with every label under each where that is asked.

        Returns what `training.collate` does, with `owner`, shape (T,), the sequence of every
        answer token, and `classes`, shape (B,).
        """
        classes = classes_of(rows, self.answers)
        if not rows:
            zero = torch.zeros(1, dtype=torch.long)
            return {**training.collate(rows), "owner": zero, "classes": classes}
        if isinstance(self.option, LogitAdjustment):
            pairs = [(row.prompt, answer) for row in rows for answer in self.answers]
        else:
            pairs = [(row.prompt, row.answer) for row in rows]
        trie = TokenTrie.build([prompt + answer[:-1] for prompt, answer in pairs])
        at, labels = targets(trie, [len(prompt) for prompt, _ in pairs], [a for _, a in pairs])
        nodes, where = torch.unique(at, return_inverse=True)
        lengths = torch.tensor([len(answer) for _, answer in pairs])
        return {
            "trie": trie,
            "nodes": nodes,
            "where": where,
            "labels": labels,
            "owner": torch.arange(len(pairs)).repeat_interleave(lengths),
            "classes": classes,
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss summed over the targets of a pass, in nats; shape ()."""
        log_p = sequence_log_probs(model, batch)  # (S,)
        classes = batch["classes"].to(log_p.device)  # (B,)
        if not len(classes):
            return -log_p.sum()  # zero, and a way back to every parameter
        match self.option:
            case None | Resampling():
                return -log_p.sum()
            case ClassWeights(strength=strength):
                return -(self._weights(strength, classes) * log_p).sum()
            case Focal(gamma=gamma, balanced=balanced):
                focused = imbalance.focused(log_p, gamma)
                if balanced:
                    focused = self._weights(1.0, classes) * focused
                return focused.sum()
            case LogitAdjustment():
                scores = log_p.view(len(classes), -1)  # (B, C)
                return imbalance.row_losses(self.option, scores, classes, self.counts).sum()

    def size(self, batch: Batch) -> training.Size:
        """Count what the loss is a mean over, rows, and what the trie ran and spared."""
        size, rows = super().size(batch), len(batch["classes"])
        targets = rows if isinstance(self.option, LogitAdjustment) else size.targets
        return size._replace(targets=targets, examples=rows)

    def _weights(self, strength: float, classes: Tensor) -> Tensor:
        """Return the weight of every row, shape (B,)."""
        return imbalance.class_weights(self.counts, strength).to(classes.device)[classes]


def sequence_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """Return log P(answer | prompt) of every sequence of a batch, in nats; shape (S,)."""
    logits = node_logits(model, batch["trie"], batch["nodes"]).float()  # (K, V)
    where, owner, labels = (batch[name].to(logits.device) for name in ("where", "owner", "labels"))
    # Normalised once a node, of which labels that begin alike share many.
    log_probs = logits.log_softmax(-1)
    real = labels != IGNORED
    picked = log_probs[where, labels.where(real, 0)].where(real, 0)  # (T,)
    sums = picked.new_zeros(len(batch["trie"].lengths))
    return sums.index_add(0, owner, picked)


def order(
    option: Imbalance | None,
    rows: Sequence[Encoded],
    answers: Sequence[Ids],
    *,
    seed: int,
    epoch: int,
) -> list[int]:
    """Return the row numbers of an epoch, in order: a function of seed and epoch alone.

    As many as there are rows; with resampling, rare classes are drawn more often.

    Args:
        option: what is done about rare classes.
        rows: all training rows.
        answers: as `classes_of` takes them.
        seed: of the run.
        epoch: from 0.
    """
    classes: np.typing.NDArray[np.int64] = classes_of(rows, answers).numpy()
    return imbalance.epoch_order(option, classes, seed=seed, epoch=epoch)
