"""The stages of the program as frozen types, in the order in which data passes them.

files --load--> Utterance --select--> Row --render--> Example --(model)--> Completion
                                                                             |
Report <--evaluate-- Prediction <--parse-- Parsed <--------------------------+
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

IGNORED = -100
"""The label of what is read, and neither learned from nor measured, as in transformers."""

Outcome = Literal["exact", "alias", "contained", "ambiguous", "refusal", "none", "scored"]
"""How a label came out of a completion; only the first three and `scored` yield a label."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """One utterance as its corpus annotates it, before any protocol.

    `uid` is unique over all splits of a corpus. `dialogue` groups rows that must not be
    parted by a split (a dialogue, a video, a document); `turn` orders them. Exactly one of
    `label` and `score` is set, except in text that nobody labelled. `votes` are the
    annotators' counts or ratings in the corpus's own order. `audio` is a file path.
    """

    uid: str
    text: str
    speaker: str | None = None
    dialogue: str | None = None
    turn: int | None = None
    label: str | None = None
    score: float | None = None
    votes: tuple[int, ...] | None = None
    audio: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """An utterance that a protocol keeps, its gold label, and the turns before it.

    `history` holds every earlier turn of the dialogue, oldest first, also those that the
    protocol does not score: a dialogue does not lose turns because a label is unclear.
    """

    utterance: Utterance
    gold: str
    history: tuple[Utterance, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A row rendered through a prompt: the pieces of the user's message, in order.

    The message is `before + history + between + text + after`. Only `text` and `history`
    come from the corpus; whatever must be shortened is taken from them, never from the
    instruction. `answer` is the label word as the model must produce it.
    """

    uid: str
    before: str
    history: tuple[str, ...]
    between: str
    text: str
    after: str
    answer: str
    gold: str
    system: str | None = None

    @property
    def message(self) -> str:
        """The user's whole message."""
        return f"{self.before}{''.join(self.history)}{self.between}{self.text}{self.after}"


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model generated after a prompt."""

    uid: str
    text: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """A label read from a completion, or the reason why there is none."""

    label: str | None
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row of `<split>.predictions.jsonl`."""

    uid: str
    gold: str | None
    label: str | None
    outcome: Outcome
    completion: str | None = None
    probabilities: Mapping[str, float] | None = None
