"""A recipe made concrete: its rows, labels and rendered examples. No model, no torch."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_emo import datasets, prompts, protocols
from llm_emo.errors import ProtocolError, RecipeError
from llm_emo.labels import LabelSet
from llm_emo.prompts import Prompt
from llm_emo.protocols import Protocol, Splits
from llm_emo.recipes import AnyRecipe, BaselineRecipe, Recipe
from llm_emo.types import SPLITS, Example, Row, Split

DATA_ROOT_VARIABLE = "LLM_EMO_DATA"


def data_root(given: Path | None) -> Path | None:
    """Return the data root: the one given, else the one in the environment."""
    if given is None and (named := os.environ.get(DATA_ROOT_VARIABLE)):
        given = Path(named)
    return None if given is None else given.expanduser().resolve()


@dataclass(frozen=True)
class _Prepared:
    """A recipe's rows and labels.

    `files` are the SHA-256 sums of the corpus files by relative path; for a hub dataset, its id.
    """

    root: Path | None
    protocol: Protocol
    labels: LabelSet
    splits: Splits
    files: dict[str, str]
    recipe: AnyRecipe

    def rows(self, split: Split) -> tuple[Row, ...]:
        """Return a split's rows, capped by `data.limit`, in the corpus's order.

        Which rows a cap keeps depends on the seed alone.

        Raises:
            ProtocolError: the split is empty.
        """
        rows, data = self.splits.get(split), self.recipe.data
        limit = getattr(data.limit, split, None) if data.limit else None
        if limit is None or limit >= len(rows):
            return rows
        kept = random.Random(f"{self.recipe.seed}/{split}").sample(range(len(rows)), limit)
        return tuple(rows[index] for index in sorted(kept))

    @property
    def clusters(self) -> dict[str, str]:
        """What each uid is resampled with: its dialogue, or itself."""
        return {
            row.utterance.uid: row.utterance.dialogue or row.utterance.uid
            for split in SPLITS
            for row in getattr(self.splits, split)
        }


@dataclass(frozen=True)
class Experiment(_Prepared):
    """What an LLM's recipe names, found and fitted together."""

    recipe: Recipe
    prompt: Prompt

    @classmethod
    def prepare(
        cls, recipe: Recipe, root: Path | None, prompt: Prompt | None = None
    ) -> "Experiment":
        """Read the corpus and make the splits.

        Args:
            recipe: What to prepare.
            root: The data root.
            prompt: The prompt that a run kept, instead of the one that the recipe names today.

        Raises:
            DatasetError: corpus files are absent or malformed.
            ProtocolError: the protocol belongs to another corpus.
            PromptError: the prompt or a label's word is missing.
        """
        prompt = prompt or prompts.load(recipe.prompt.name)
        protocol = _protocol(recipe)
        labels = prompts.label_set(protocol.labels, prompt.language)
        return cls(root, protocol, labels, *_rows(recipe, protocol, root), recipe, prompt)

    def render(self, rows: Sequence[Row]) -> list[Example]:
        """Render rows through the recipe's prompt."""
        window = self.recipe.prompt.history_window
        return [self.prompt.render(row, self.labels, history_window=window) for row in rows]

    def examples(self, split: Split) -> list[Example]:
        """Return a split's rendered examples."""
        return self.render(self.rows(split))

    @cached_property
    def answers(self) -> list[str]:
        """The text of every label's answer, in label order."""
        return [self.prompt.answer(word) for word in self.labels.words]

    def labels_json(self) -> dict[str, Any]:
        """Return what `labels.json` holds."""
        return {
            "protocol": self.protocol.name,
            "language": self.labels.language,
            "names": list(self.labels.names),
            "words": list(self.labels.words),
            "answers": self.answers,
            "aliases": dict(self.labels.aliases),
        }


@dataclass(frozen=True)
class BaselineExperiment(_Prepared):
    """What a specialised model's recipe names, found and fitted together."""

    recipe: BaselineRecipe

    @classmethod
    def prepare(cls, recipe: BaselineRecipe, root: Path | None) -> "BaselineExperiment":
        """Read the corpus and make the splits.

        Raises:
            DatasetError: corpus files are absent or malformed.
            ProtocolError: the protocol belongs to another corpus.
        """
        protocol = _protocol(recipe)
        # A specialised model has numbers for classes, and needs no word for them.
        labels = LabelSet(protocol.labels, protocol.labels)
        return cls(root, protocol, labels, *_rows(recipe, protocol, root), recipe)

    def labels_json(self) -> dict[str, Any]:
        """Return what `labels.json` holds."""
        return {"protocol": self.protocol.name, "names": list(self.labels.names)}


AnyExperiment = Experiment | BaselineExperiment


def prepare(recipe: AnyRecipe, root: Path | None) -> AnyExperiment:
    """Prepare a recipe of either sort; raises what its `prepare` raises."""
    if isinstance(recipe, BaselineRecipe):
        return BaselineExperiment.prepare(recipe, root)
    return Experiment.prepare(recipe, root)


def _protocol(recipe: AnyRecipe) -> Protocol:
    data = recipe.data
    protocol = protocols.get(data.protocol)
    if protocol.dataset != data.dataset:
        known = ", ".join(p.name for p in protocols.of(data.dataset))
        raise ProtocolError(
            f"data.protocol: {protocol.name} is a protocol of {protocol.dataset}, not of "
            f"{data.dataset} (known there: {known})"
        )
    return protocol


def _rows(
    recipe: AnyRecipe, protocol: Protocol, root: Path | None
) -> tuple[Splits, dict[str, str]]:
    data = recipe.data
    corpus = datasets.read(data.dataset, root, hub=data.hub)
    splits = protocols.rows(
        protocol, corpus, seed=recipe.seed, fold=data.fold, dev_fraction=data.dev_fraction
    )
    files = {"hub": data.hub} if data.hub else datasets.file_hashes(data.dataset, root)
    return splits, files


def dialogues(rows: Sequence[Row]) -> list[list[int]]:
    """Return the row numbers of every dialogue, in the order of its turns.

    A row without a dialogue is one by itself.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for number, row in enumerate(rows):
        dialogue, uid = row.utterance.dialogue, row.utterance.uid
        # Tagged, because a dialogue may be called like another's row.
        key = ("dialogue", dialogue) if dialogue else ("row", uid)
        found.setdefault(key, []).append(number)
    return [
        sorted(turns, key=lambda row: rows[row].utterance.turn or 0) for turns in found.values()
    ]


def dialogues_of(experiment: Experiment) -> list[list[int]] | None:
    """Return the dialogues of a recipe's training rows; None where it batches by row.

    Raises:
        RecipeError: it batches by dialogue, and the corpus has none.
    """
    settings = experiment.recipe.train
    if settings is None or settings.batch_by == "row":
        return None
    rows = experiment.rows("train")
    if all(row.utterance.dialogue is None for row in rows):
        raise RecipeError(
            f"train.batch_by: dialogue, but the rows of {experiment.recipe.data.dataset} belong to "
            "no dialogues; set train.batch_by=row"
        )
    return dialogues(rows)
