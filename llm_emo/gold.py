"""Gold labels: how raw labels and scores of the corpora become the classes of protocols."""

import math
from collections.abc import Callable, Mapping, Sequence

from llm_emo.errors import ProtocolError, nearest
from llm_emo.types import Utterance

Gold = Callable[[Utterance], str | None]
"""The label of an utterance under a protocol, or None where the protocol leaves it out."""

POLARITY = ("negative", "positive")
THREE = ("negative", "neutral", "positive")
FIVE = ("very negative", "negative", "neutral", "positive", "very positive")
SEVEN = (
    "strongly negative",
    "negative",
    "weakly negative",
    "neutral",
    "weakly positive",
    "positive",
    "strongly positive",
)
SIMS_FIVE = ("negative", "weakly negative", "neutral", "weakly positive", "positive")
EKMAN = ("neutral", "joy", "sadness", "fear", "anger", "surprise", "disgust")
M3ED = ("happy", "neutral", "sad", "disgust", "anger", "fear", "surprise")
IEMOCAP = {
    "ang": "anger",
    "hap": "happy",
    "exc": "excited",
    "sad": "sad",
    "neu": "neutral",
    "fru": "frustrated",
}


def only(gold: Gold, kept: Sequence[str]) -> Gold:
    """Return `gold` for the labels in `kept`, None for the others."""

    def narrowed(utterance: Utterance) -> str | None:
        label = gold(utterance)
        return label if label in kept else None

    return narrowed


def by_label(names: Mapping[str, str | None]) -> Gold:
    """Return a `gold` that maps raw labels; a raw label that `names` lacks is an error."""

    def gold(utterance: Utterance) -> str | None:
        if utterance.label is None:
            return None
        try:
            return names[utterance.label]
        except KeyError:
            raise ProtocolError(
                f"row {utterance.uid}: the label {utterance.label!r} is not in the set; "
                f"{nearest(utterance.label, names)}"
            ) from None

    return gold


def by_score(class_of: Callable[[float], str | None]) -> Gold:
    """Return a `gold` that cuts scores."""

    def gold(utterance: Utterance) -> str | None:
        return None if utterance.score is None else class_of(utterance.score)

    return gold


def sign(score: float) -> str:
    """Return the sentiment of the sign: MOSI has 53 values, only their sign is safe."""
    return "negative" if score < 0 else "positive" if score > 0 else "neutral"


def seven(score: float) -> str:
    """Return MMSA's seven classes: clip to [-3, 3], round half to even as `np.round` does.

    So ±0.5 is neutral, ±1.5 and ±2.5 are both ±2.

    >>> [seven(score) for score in (-2.5, -0.5, 0.5, 1.5)]
    ['negative', 'neutral', 'neutral', 'positive']
    """
    return SEVEN[round(max(-3.0, min(3.0, score))) + 3]


def cut(score: float, cuts: Sequence[float], labels: Sequence[str]) -> str:
    """Return the class of a score between cuts, each belonging to the class below it.

    >>> cut(-0.1, (-0.1, 0.1), ("negative", "neutral", "positive"))
    'negative'
    """
    return labels[sum(score > bound and not math.isclose(score, bound) for bound in cuts)]


def rated(score: float) -> str:
    """Return the class of a mean rating from -4 to 4, at ±0.5: both ends are sentiment.

    >>> [rated(score) for score in (-0.5, -0.4, 0.5)]
    ['negative', 'neutral', 'positive']
    """
    return "negative" if score <= -0.5 else "positive" if score >= 0.5 else "neutral"
