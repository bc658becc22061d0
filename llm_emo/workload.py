"""What a recipe's run computes: its rows in tokens, its batches in nodes, its evaluations.

Nothing here is sampled: every batch of every epoch is counted, from the corpus's own texts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_emo import recipes
from llm_emo.encoded_rows import encoded
from llm_emo.encoding import Encoded, Encoder
from llm_emo.experiment import Experiment, dialogues_of
from llm_emo.inference import Ids, cuts
from llm_emo.models import auto
from llm_emo.models.meta import config_of
from llm_emo.node_counts import NodeCounts
from llm_emo.steps import Steps, sequence
from llm_emo.types import Split

_LONGER = {"en": "about a tenth larger", "zh": "2.3 to 2.5 times as large"}
"""Batches of 16 rows in the bundled model's tokens, beside ChatGLM2's: 5 to 13 % larger on SST-5,
Friends, Mastodon, TweetEval and MOSI; 2.3 and 2.4 times on M3ED and CH-SIMS."""


@dataclass(frozen=True)
class Workload:
    """The encoded rows of an experiment.

    `notes` say where something stands in for what is not on this machine. `evaluated` is the
    split that is predicted: dev while training, test for a recipe that trains nothing.
    """

    experiment: Experiment
    config: Any
    train: list[Encoded]
    evaluated: Split
    prompts: list[Ids]
    answers: list[Ids]
    notes: list[str]

    @classmethod
    def of(cls, experiment: Experiment) -> "Workload":
        """Encode an experiment's rows.

        Raises:
            ModelError: there is no such model or tokenizer.
            PromptError: an example leaves no room for its answer.
        """
        recipe = experiment.recipe
        config, stands_in = config_of(recipe.model)
        notes = []
        length = recipe.prompt.max_length
        if stands_in:
            longer = _LONGER.get(experiment.labels.language, "longer by an unknown share")
            notes.append(
                f"{recipe.model.name} is not there: sizes are those of ChatGLM2-6B, lengths those "
                f"of the bundled model's tokenizer, whose batches are {longer}"
            )
            bundled = recipe.model.model_copy(update={"name": recipes.BUNDLED_MODEL})
            # With another tokenizer an instruction may not fit; rows are cut below instead.
            encoder = Encoder(auto.load_tokenizer(bundled), 100 * length)
        else:
            encoder = Encoder(auto.load_tokenizer(recipe.model), length)
        train: list[Encoded] = []
        if recipe.train is not None:
            train = [_cut(row, length) for row in encoded(encoder, experiment.examples("train"))]
        evaluated: Split = "dev"
        if recipe.train is None and experiment.splits.test:
            evaluated = "test"
        rows = encoder.encode(experiment.examples(evaluated))
        return cls(
            experiment=experiment,
            config=config,
            train=train,
            evaluated=evaluated,
            prompts=[_cut(row, length).prompt for row in rows],
            answers=encoder.answers(experiment.answers),
            notes=notes,
        )

    @cached_property
    def _counts(self) -> NodeCounts:
        return NodeCounts([sequence(row) for row in self.train])

    @cached_property
    def _dialogues(self) -> list[list[int]] | None:
        return dialogues_of(self.experiment)

    @cached_property
    def tokens(self) -> int:
        """Tokens of the training rows, each for itself, over all epochs."""
        assert self.experiment.recipe.train is not None
        epochs = self.experiment.recipe.train.epochs
        return epochs * sum(len(row.prompt) + len(row.answer) - 1 for row in self.train)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        train = self.experiment.recipe.train
        assert train is not None
        return train.epochs * math.ceil(len(self.train) / train.batch_size)

    def batches(self, micro_batch_size: int, tokens_per_pass: int | None) -> "Batches":
        """Draw all passes of the run, as one process would with so many rows and tokens at most."""
        recipe = self.experiment.recipe
        assert recipe.train is not None
        size = {"micro_batch_size": micro_batch_size, "tokens_per_pass": tokens_per_pass}
        drawn = Steps(
            self.train, recipe.train.model_copy(update=size), seed=recipe.seed,
            dialogues=self._dialogues,
        )  # fmt: skip
        rows: list[list[int]] = []
        for epoch in range(recipe.train.epochs):
            drawn.set_epoch(epoch)
            for step in drawn:
                rows += step
        return Batches(self.train, rows, self._counts.nodes(rows), len(rows) > self.steps)

    def passes(self, tokens_per_pass: int) -> "Passes":
        """Group the evaluated rows as scoring or generation would."""
        inference = self.experiment.recipe.inference
        score = inference.mode == "score"
        # What the answers add behind a prompt, as in `inference`: all of their tokens as its
        # budget counts them, and those that differ as the trie has them.
        budgeted = sum(len(answer) - 1 for answer in self.answers)
        read = {answer[:i] for answer in self.answers for i in range(len(answer))}
        groups: list[list[int]] = []
        behind: list[int] = []
        ahead: list[int] = []
        before: Ids = ()
        extra = budgeted if score else inference.max_new_tokens
        for cut in cuts(self.prompts, extra, tokens_per_pass):
            if cut.beginning and cut.beginning != before:
                ahead.append(len(cut.beginning))
            before = cut.beginning
            groups += [[cut.first + row for row in group] for group in cut.passes]
            behind += [len(before)] * len(cut.passes)
        rows = np.array([len(group) for group in groups])
        added = len(read) - 1 if score else 0
        return Passes(
            prompts=self.prompts,
            groups=groups,
            nodes=NodeCounts(self.prompts).nodes(groups) - np.array(behind) + added * rows,
            behind=np.array(behind),
            ahead=np.array(ahead, dtype=np.int64),
            logits=rows * (len(read) if score else 1),
        )


@dataclass(frozen=True)
class Batches:
    """All passes of a run; `nodes`, shape (number of them,), counts their tries' nodes.

    `accumulating` says whether some step has several, and so gradients of earlier ones.
    """

    train: Sequence[Encoded]
    rows: list[list[int]]
    nodes: NDArray[np.int64]
    accumulating: bool

    def largest(self) -> list[Encoded]:
        """Return the rows of the pass with the most nodes."""
        return [self.train[row] for row in self.rows[int(self.nodes.argmax())]]

    @cached_property
    def logits(self) -> NDArray[np.int64]:
        """Answer tokens of every pass: at most so many nodes need logits."""
        answers = np.array([len(row.answer) for row in self.train])
        return np.array([answers[batch].sum() for batch in self.rows])


@dataclass(frozen=True)
class Passes:
    """All passes of one evaluation: groups of prompts, their nodes, and the nodes with logits.

    What all prompts begin with is run `ahead` of the passes, once, and every pass stands `behind`
    so many of its tokens; `nodes` are those that a pass runs itself.
    """

    prompts: Sequence[Ids]
    groups: list[list[int]]
    nodes: NDArray[np.int64]
    behind: NDArray[np.int64]
    ahead: NDArray[np.int64]
    logits: NDArray[np.int64]

    @property
    def run(self) -> int:
        """Tokens that are run in all."""
        return int(self.nodes.sum() + self.ahead.sum())

    @property
    def highest(self) -> int:
        """The pass that sees the most tokens, its beginning's included."""
        return int((self.nodes + self.behind).argmax())

    def largest(self) -> list[list[Ids]]:
        """Return the prompts of the pass with the most tokens, and of that with the most logits."""
        places = {self.highest, int(self.logits.argmax())}
        return [[self.prompts[row] for row in self.groups[place]] for place in sorted(places)]


def _cut(row: Encoded, length: int) -> Encoded:
    """Return the row at no more than `length` tokens; with its own tokenizer it never is."""
    room = length - len(row.answer)
    return row if len(row.prompt) <= room else replace(row, prompt=row.prompt[:room], dropped=1)
