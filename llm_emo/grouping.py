"""Splits that keep what belongs together on one side: dialogues, speakers, repeated texts."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from llm_emo.types import Row, Utterance

Unit = Literal["dialogue", "speaker", "row", "document and text"]


def unit_of(rows: Sequence[Utterance]) -> Unit:
    """Return what a split of `rows` must not part: dialogues, else speakers, else nothing."""
    if any(row.dialogue is not None for row in rows):
        return "dialogue"
    if any(row.speaker is not None for row in rows):
        return "speaker"
    return "row"


def group(rows: Sequence[Utterance], unit: Unit) -> dict[str, str]:
    """Return the name of its group for every uid.

    A row without a dialogue (or speaker) is a group of its own. For "document and text",
    rows of one document belong together and so do rows whose texts differ in case and
    white space only; a group is whatever hangs together through either.
    """
    if unit == "row":
        return {row.uid: row.uid for row in rows}
    if unit == "speaker":
        return {row.uid: row.speaker or row.uid for row in rows}
    if unit == "dialogue":
        return {row.uid: row.dialogue or row.uid for row in rows}
    links = [
        (f"document {row.dialogue or row.uid}", f"text {' '.join(row.text.casefold().split())}")
        for row in rows
    ]
    heads = _connect(links)
    return {row.uid: heads[document] for row, (document, _) in zip(rows, links, strict=True)}


def _connect(links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the smallest name in the component of every name that `links` mention."""
    parents: dict[str, str] = {}

    def head(name: str) -> str:
        parents.setdefault(name, name)
        while parents[name] != name:
            parents[name] = parents[parents[name]]  # halve the path for the next search
            name = parents[name]
        return name

    for one, other in links:
        low, high = sorted((head(one), head(other)))
        parents[high] = low
    return {name: head(name) for name in parents}


def choose(
    groups: Mapping[str, str], gold: Mapping[str, str], fraction: float, seed: int
) -> frozenset[str]:
    """Return groups that together hold about `fraction` of the rows, and of every label.

    Groups are taken in an order that only their names and the seed decide (a hash, so that
    it is the same under every version of Python), each one if it brings the label counts
    closer to `fraction` of the whole. At least one group is taken and one is left.

    Args:
        groups: the group of every uid.
        gold: the label of every uid that counts; the others follow their group.
        fraction: of the rows in `gold`, between 0 and 1.
        seed: another seed gives another choice.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for uid, label in gold.items():
        counts[groups[uid]][label] += 1
    order = sorted(counts, key=lambda name: _hash(f"{seed}/{name}"))
    target = {label: fraction * n for label, n in Counter(gold.values()).items()}
    taken: Counter[str] = Counter()
    chosen: list[str] = []
    for name in order:
        if len(chosen) == len(order) - 1:
            break
        if _distance(taken + counts[name], target) < _distance(taken, target):
            taken += counts[name]
            chosen.append(name)
    if not chosen and len(order) > 1:
        chosen = [min(order, key=lambda name: counts[name].total())]
    return frozenset(chosen)


def _distance(counts: Mapping[str, int], target: Mapping[str, float]) -> float:
    return sum((counts.get(label, 0) - wanted) ** 2 for label, wanted in target.items())


def pick(names: Iterable[str], seed: int) -> str:
    """Return one of `names`, decided by the seed."""
    return min(names, key=lambda name: _hash(f"{seed}/{name}"))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest(uids: Iterable[str]) -> str:
    """Return the SHA-256 over sorted uids, one a line: the identity of a set of rows."""
    return _hash("\n".join(sorted(uids)))


def with_history(
    utterances: Sequence[Utterance], gold: Callable[[Utterance], str | None]
) -> tuple[Row, ...]:
    """Return the utterances that `gold` keeps, each with every earlier turn of its dialogue.

    Turns that `gold` drops stay in the history of later ones.
    """
    dialogues: dict[str, list[Utterance]] = defaultdict(list)
    for utterance in utterances:
        if utterance.dialogue is not None and utterance.turn is not None:
            dialogues[utterance.dialogue].append(utterance)
    history: dict[str, tuple[Utterance, ...]] = {}
    for turns in dialogues.values():
        turns.sort(key=lambda utterance: utterance.turn or 0)
        for place, utterance in enumerate(turns):
            history[utterance.uid] = tuple(turns[:place])
    labelled = ((utterance, gold(utterance)) for utterance in utterances)
    return tuple(
        Row(utterance, label, history.get(utterance.uid, ()))
        for utterance, label in labelled
        if label is not None
    )
