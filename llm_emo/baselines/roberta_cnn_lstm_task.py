"""Method `roberta_cnn_lstm`: stage 2 of paper 000 over the features of a finished encoder run.

A split's dialogues are put together from its rows and their histories. Turns that the protocol
does not score are read and have no label; so are rows that a limit left out. A turn behind the
last row of its dialogue is in no row's history, and is not read. A row without a dialogue is a
dialogue of one turn.

What is saved holds the encoder's files too, as hard links where the disk allows. So a run goes on
working when the encoder's run is moved or trained anew, and can be exported.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_emo import runs
from llm_emo.baselines import nested, opening, roberta_cnn_lstm
from llm_emo.baselines.classifier import Classifier, Item, lent_gpu
from llm_emo.baselines.dialogues import Dialogue, dialogues
from llm_emo.baselines.encoder import width
from llm_emo.baselines.encoder_task import EncoderClassifier
from llm_emo.baselines.kinds import RobertaCnnLstm
from llm_emo.baselines.storage import CLASSIFIER, load_weights, save_weights
from llm_emo.errors import RecipeError
from llm_emo.experiment import BaselineExperiment
from llm_emo.types import IGNORED, Row, Split

ENCODER = "encoder"

UNSCORED = ""
"""The gold label of a turn that is only read; features do not depend on it."""


class DialogueClassifier(Classifier):
    """The dialogue network, and the encoder whose features it reads; an item is a dialogue.

    Args:
        names: C classes.
        model: the dialogue network.
        below: the finished run of the encoder, which is not trained.
    """

    model: roberta_cnn_lstm.RobertaCnnLstm

    def __init__(
        self,
        names: Sequence[str],
        model: roberta_cnn_lstm.RobertaCnnLstm,
        below: nested.Nested,
    ) -> None:
        super().__init__(names, model)
        assert isinstance(below.classifier, EncoderClassifier)
        self.encoder, self.below = below.classifier, below
        self._read: dict[Split, dict[str, Any]] = {}

    def items(self, rows: Sequence[Row], split: Split, *, augmented: bool) -> list[Item]:
        """Return one item a dialogue, its turns' features (T, D); nothing is augmented."""
        made = _together(rows)
        turns = [Row(turn, UNSCORED) for dialogue in made for turn in dialogue.turns]
        started, before = time.perf_counter(), self.encoder.encoded
        whole = self._features(turns, split)
        self._read[split] = {
            "dialogues": len(made),
            "turns": len(turns),
            "features_seconds": round(time.perf_counter() - started, 3),
            "features_cached": self.encoder.encoded == before,
        }
        lengths = [len(dialogue.turns) for dialogue in made]
        parts = torch.split(whole, lengths)
        return [self._item(dialogue, own) for dialogue, own in zip(made, parts, strict=True)]

    def _item(self, dialogue: Dialogue, own: Tensor) -> Item:
        scored = [gold is not None for gold in dialogue.golds]
        labels = (IGNORED if gold is None else self.names.index(gold) for gold in dialogue.golds)
        uids = (
            turn.uid if is_scored else None
            for turn, is_scored in zip(dialogue.turns, scored, strict=True)
        )
        return Item(own, tuple(labels), tuple(uids))

    def _features(self, turns: Sequence[Row], split: Split) -> Tensor:
        """Return the encoder's features, shape (N, D), computed on a GPU where there is one."""
        with lent_gpu(self.encoder.model):
            return self.encoder.encode(turns, split).features

    def batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return `features`, shape (B, T, D), and `lengths`, shape (B,)."""
        padded, lengths = roberta_cnn_lstm.pad([item.inputs for item in items])
        return {"features": padded, "lengths": lengths}

    def scores(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return class scores of every turn, shape (N, C), dialogue by dialogue, no padding."""
        scores: Tensor = model(**batch)  # (B, T, C)
        there = ~roberta_cnn_lstm.turns_beyond(batch["lengths"], scores.shape[1])
        return scores[there]

    def save(self, folder: Path) -> None:
        """Write the weights, and take the encoder along."""
        save_weights(folder / CLASSIFIER, self.model)
        nested.keep(self.below, folder / ENCODER)

    def facts(self) -> dict[str, Any]:
        """Return the encoder, and of each split read its dialogues, turns and features' time."""
        return {
            "encoder": self.encoder.method.name,
            "splits": {split: dict(read) for split, read in self._read.items()},
        }


def create(method: RobertaCnnLstm, experiment: BaselineExperiment) -> DialogueClassifier:
    """Return a random dialogue network over the encoder run that the recipe names.

    Raises:
        RunError: there is no such run, it has not finished, or it parts other rows.
        RecipeError: it is of another method.
        ModelError: its files are damaged.
    """
    path = Path(method.encoder_run)
    if runs.is_run(path):  # asked before its corpus and weights are read
        kind = runs.Run(path).recipe.method.kind
        if kind != "encoder":
            raise RecipeError(
                f"method.encoder_run: {path} is a run of method {kind}; expected encoder"
            )
    opened = opening.open_run(method.encoder_run, experiment)
    assert isinstance(opened.classifier, EncoderClassifier)
    made = _network(method, opened.classifier)
    names = experiment.labels.names
    encoder = opened.classifier
    below = nested.Nested(opened.run.adapter, encoder.method, encoder, opened.learned)
    return DialogueClassifier(names, made, below)


def load(
    method: RobertaCnnLstm, experiment: BaselineExperiment, folder: Path
) -> DialogueClassifier:
    """Return what `DialogueClassifier.save` wrote into `folder`.

    Raises:
        ModelError: a file is absent, damaged, or of other settings.
    """
    below = nested.read(folder / ENCODER, experiment)
    assert isinstance(below.classifier, EncoderClassifier)
    with torch.random.fork_rng(devices=[]):  # as there
        made = _network(method, below.classifier)
    load_weights(folder / CLASSIFIER, made)
    return DialogueClassifier(experiment.labels.names, made.eval(), below)


def _network(method: RobertaCnnLstm, encoder: EncoderClassifier) -> roberta_cnn_lstm.RobertaCnnLstm:
    inputs, classes = width(encoder.model), len(encoder.names)
    return roberta_cnn_lstm.RobertaCnnLstm(method.network, inputs=inputs, classes=classes)


def _together(rows: Sequence[Row]) -> list[Dialogue]:
    """Return the dialogues that rows and their histories make up."""
    turns = {turn.uid: turn for row in rows for turn in (*row.history, row.utterance)}
    return dialogues(tuple(turns.values()), {row.utterance.uid: row.gold for row in rows})
