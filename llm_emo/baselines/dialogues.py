"""Utterances put together as dialogues, for models that read whole ones. No torch here."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm_emo.types import Utterance


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The turns of a dialogue, oldest first; a sentence without a dialogue is one turn.

    `golds` has None for turns that the protocol does not score: a model reads them, and neither
    learns from them nor is measured on them.
    """

    turns: tuple[Utterance, ...]
    golds: tuple[str | None, ...]


def dialogues(utterances: Sequence[Utterance], gold: Mapping[str, str]) -> list[Dialogue]:
    """Return the dialogues with a scored turn, in the order in which the corpus begins them.

    As in `grouping.with_history`, a row without a dialogue or without a turn stands alone: rows
    of one document are no conversation.

    Args:
        utterances: of one split, those that the protocol does not score included.
        gold: label of each scored uid.
    """
    groups: dict[tuple[bool, str], list[Utterance]] = defaultdict(list)
    for utterance in utterances:
        alone = utterance.dialogue is None or utterance.turn is None
        groups[alone, utterance.uid if alone else utterance.dialogue or ""].append(utterance)
    made = []
    for group in groups.values():
        turns = tuple(sorted(group, key=lambda utterance: utterance.turn or 0))
        golds = tuple(gold.get(utterance.uid) for utterance in turns)
        if any(golds):
            made.append(Dialogue(turns, golds))
    return made
