"""Protocols: which rows of a corpus count, in which classes, by which metric.

A number without its protocol means nothing: on Friends alone, 2,764, 2,223 and 1,837 test
rows are in use. `TABLE` is the list of all; `rows` turns a corpus into train, dev and test
rows under one of them and records how.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llm_emo import datasets, grouping
from llm_emo.baselines import folds
from llm_emo.datasets.base import ALL
from llm_emo.errors import ProtocolError, nearest
from llm_emo.gold import (
    EKMAN,
    FIVE,
    IEMOCAP,
    M3ED,
    POLARITY,
    SEVEN,
    SIMS_FIVE,
    THREE,
    Gold,
    by_label,
    by_score,
    cut,
    only,
    rated,
    seven,
    sign,
)
from llm_emo.types import SPLITS, Row, Split, Utterance

Partition = Literal["official", "speakers", "sessions", "fifth session", "documents", "random"]
"""Where the test split comes from: the corpus, or which units are held out; "random" holds out
single rows, so that speakers (and parts of a dialogue) are in train and test alike."""

TEST_FRACTION = 0.2
"""Of a corpus that publishes no test split ("documents"); the same rows for every seed."""


@dataclass(frozen=True)
class Protocol:
    """Rows, classes and metrics under which numbers are comparable.

    `labels` are canonical names in the order of their ids. `gold` gives an utterance's
    label, or None where the protocol leaves it out. `metrics[0]` is the headline and
    selects models on dev; `averaged_over` are the labels of the metric `f1`. `in_test`
    leaves out further rows of the test split only. `n_test` is the published size of the test
    split, None where it is cross-validated or made here.
    """

    name: str
    dataset: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    used_by: str
    gold: Gold = field(repr=False)
    averaged_over: tuple[str, ...] | None = None
    n_test: int | None = None
    partition: Partition = "official"
    in_test: Callable[[Utterance], bool] = field(default=lambda utterance: True, repr=False)

    def expected_rows(self, split: Split) -> int | None:
        """Return how many rows `split` has where the protocol is published, if that is known."""
        return self.n_test if split == "test" else None

    def size_warning(self, split: Split, rows: int) -> str | None:
        """Return what is wrong with numbers on `rows` rows of `split`, or None.

        Half a test file is no error, because people try things out on it; but a number on it
        must not pass for one under the protocol.
        """
        expected = self.expected_rows(split)
        if expected is None or rows == expected:
            return None
        return (
            f"{self.name}: found {rows:,} rows in the {split} split, expected {expected:,}; "
            "numbers on them are not comparable with published ones (is a corpus file cut or "
            "changed, or data.limit set?)"
        )


@dataclass(frozen=True)
class Splits:
    """The rows of a protocol, and how they came about.

    `record` is JSON-able: protocol, seed, fold, folds (how many there are), how dev and test were
    made, per split the rows, labels, left-out rows and a SHA-256 over the sorted uids.
    """

    train: tuple[Row, ...]
    dev: tuple[Row, ...]
    test: tuple[Row, ...]
    record: dict[str, Any]

    def get(self, split: Split) -> tuple[Row, ...]:
        """Return the rows of a split.

        Raises:
            ProtocolError: it has none; the message says where to get them.
        """
        rows: tuple[Row, ...] = getattr(self, split)
        if not rows:
            how = datasets.get(self.record["dataset"]).how_to_get
            raise ProtocolError(
                f"{self.record['protocol']}: empty split {split!r}: "
                f"{self.record['how'][split]}; {how}"
            )
        return rows


def names() -> tuple[str, ...]:
    """Return the names of all protocols, in the order of the table."""
    return tuple(TABLE)


def get(name: str) -> Protocol:
    """Return the protocol called `name`.

    Raises:
        ProtocolError: there is none; the message names the nearest.
    """
    try:
        return TABLE[name]
    except KeyError:
        raise ProtocolError(f"unknown protocol {name!r}; {nearest(name, TABLE)}") from None


def of(dataset: str) -> tuple[Protocol, ...]:
    """Return the protocols of a corpus, the default one first."""
    return tuple(protocol for protocol in TABLE.values() if protocol.dataset == dataset)


def require_comparable(a: str, b: str) -> None:
    """Raise unless numbers under the protocols `a` and `b` may be compared.

    Raises:
        ProtocolError: they are two protocols; the message says in what they differ.
    """
    one, other = get(a), get(b)
    if one is other:
        return
    differences = [
        f"{what} ({getattr(one, key)} and {getattr(other, key)})"
        for what, key in (
            ("dataset", "dataset"),
            ("classes", "labels"),
            ("test rows", "n_test"),
            ("metric", "metrics"),
        )
        if getattr(one, key) != getattr(other, key)
    ]
    raise ProtocolError(
        f"{a} and {b} are not comparable: they differ in {'; '.join(differences) or 'their rows'}; "
        "evaluate both under one protocol"
    )


def rows(
    protocol: Protocol,
    corpus: Mapping[str, Sequence[Utterance]],
    *,
    seed: int,
    fold: int | None = None,
    dev_fraction: float = 0.1,
) -> Splits:
    """Return the train, dev and test rows of `protocol` out of what `datasets.read` gives.

    Where the corpus has no dev split, one is made from train: whole dialogues (else
    speakers, else rows), with about `dev_fraction` of every label. A split that is absent
    on disk is empty here, and says so when `Splits.get` asks for it.

    Args:
        protocol: of this corpus.
        corpus: keyed train, dev, test, or "all".
        seed: decides the dev split that is made here, never the test split.
        fold: which speaker or session is held out, for protocols that cross-validate.
        dev_fraction: of the train rows, between 0 and 1.

    Raises:
        ProtocolError: a fold is missing, superfluous or out of range, a label is unknown to
            the protocol, or `dev_fraction` is no fraction.
    """
    if not 0 < dev_fraction < 1:
        raise ProtocolError(f"dev_fraction: found {dev_fraction}; expected between 0 and 1")
    parts = {name: list(part) for name, part in corpus.items()}
    how: dict[str, str] = {
        split: f"the corpus's {split} split" if split in parts else f"no {split} split was found"
        for split in SPLITS
    }
    if protocol.partition == "official":
        if fold is not None:
            raise ProtocolError(f"{protocol.name}: has no folds, got fold {fold}; leave it out")
    else:
        parts, how = _hold_out(protocol, parts[ALL], seed, fold)
    if not parts.get("dev") and parts.get("train"):
        parts, how["dev"] = _split_dev(protocol, parts, seed, dev_fraction)
    kept = {
        split: grouping.with_history(parts.get(split, []), _gold(protocol, split))
        for split in SPLITS
    }
    record = {
        "protocol": protocol.name,
        "dataset": protocol.dataset,
        "seed": seed,
        "fold": fold,
        "folds": _count_folds(protocol, corpus),
        "how": how,
        "rows": {split: len(kept[split]) for split in SPLITS},
        "left_out": {split: len(parts.get(split, [])) - len(kept[split]) for split in SPLITS},
        "labels": {
            split: {
                label: Counter(row.gold for row in kept[split])[label] for label in protocol.labels
            }
            for split in SPLITS
        },
        "uids_sha256": {
            split: grouping.digest(row.utterance.uid for row in kept[split]) for split in SPLITS
        },
        "n_test_published": protocol.n_test,
    }
    return Splits(kept["train"], kept["dev"], kept["test"], record)


def leaks(train: Sequence[Row], test: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the test rows whose exact text also occurs in train; nothing is removed.

    One object a test row: test (uid), train (uids), same_label (of all of them).
    """
    seen: dict[str, list[Row]] = defaultdict(list)
    for row in train:
        seen[row.utterance.text].append(row)
    return [
        {
            "test": row.utterance.uid,
            "train": [other.utterance.uid for other in seen[row.utterance.text]],
            "same_label": all(other.gold == row.gold for other in seen[row.utterance.text]),
        }
        for row in test
        if row.utterance.text in seen
    ]


def _gold(protocol: Protocol, split: str) -> Gold:
    if split != "test":
        return protocol.gold
    return lambda row: protocol.gold(row) if protocol.in_test(row) else None


def _hold_out(
    protocol: Protocol, everything: list[Utterance], seed: int, fold: int | None
) -> tuple[dict[str, list[Utterance]], dict[str, str]]:
    """Part a corpus without official splits into train, test and, by speaker, dev."""
    if protocol.partition == "documents":
        _refuse_fold(protocol, fold)
        counted = [row for row in everything if protocol.gold(row) is not None]
        groups = grouping.group(counted, "document and text")
        # Seed 0 whatever the run's seed is: a test split is one set of rows.
        held = grouping.choose(groups, _labels(protocol, counted), TEST_FRACTION, 0)
        parts = _part(counted, lambda row: "test" if groups[row.uid] in held else "train")
        test = f"{TEST_FRACTION:.0%} of the rows, whole documents and repeated texts; fixed"
        return parts, {"train": "the rest", "dev": "", "test": test}
    if protocol.partition == "fifth session":
        _refuse_fold(protocol, fold)
        parts = _part(everything, lambda row: "test" if _session(row) == "Ses05" else "train")
        return parts, {"train": "sessions 1 to 4", "dev": "", "test": "session 5"}
    if protocol.partition == "random":
        return _random(protocol, everything, fold)
    by = _session if protocol.partition == "sessions" else _speaker
    units = _units(protocol, everything)
    if fold is None or not 0 <= fold < len(units):
        raise ProtocolError(
            f"{protocol.name}: found fold {fold}; expected 0 to {len(units) - 1}: the fold is the "
            f"{protocol.partition[:-1]} held out ({', '.join(units)})"
        )
    if len(units) < 3:
        raise ProtocolError(
            f"{protocol.name}: found {len(units)} {protocol.partition} ({', '.join(units)}); "
            "expected at least three, for train, dev and test"
        )
    test_unit = units[fold]
    dev_unit = grouping.pick((unit for unit in units if unit != test_unit), seed)
    where = {test_unit: "test", dev_unit: "dev"}
    kind = protocol.partition[:-1]
    return _part(everything, lambda row: where.get(by(row), "train")), {
        "train": f"the other {protocol.partition}",
        "dev": f"{kind} {dev_unit}, chosen by seed {seed}",
        "test": f"{kind} {test_unit}, fold {fold} of {len(units)}",
    }


def _count_folds(protocol: Protocol, corpus: Mapping[str, Sequence[Utterance]]) -> int | None:
    if protocol.partition == "random":
        return folds.FOLDS
    if protocol.partition in ("speakers", "sessions"):
        return len(_units(protocol, corpus[ALL]))
    return None


def _units(protocol: Protocol, everything: Sequence[Utterance]) -> list[str]:
    """Return the speakers or sessions, each of which is a fold."""
    by = _session if protocol.partition == "sessions" else _speaker
    return sorted({by(row) for row in everything})


def _random(
    protocol: Protocol, everything: list[Utterance], fold: int | None
) -> tuple[dict[str, list[Utterance]], dict[str, str]]:
    if fold is None:
        raise ProtocolError(
            f"{protocol.name}: found no fold; expected 0 to {folds.FOLDS - 1}: the fold is the "
            "fifth held out"
        )
    counted = [row for row in everything if protocol.gold(row) is not None]
    # Seed 0 whatever the run's seed is: a test split is one set of rows.
    splits = folds.random_fold(_labels(protocol, counted), fold, 0)
    shared = "of every class, drawn row by row; speakers are shared between the splits"
    return _part(counted, lambda row: splits[row.uid]), {
        "train": f"55% {shared}",
        "dev": f"25% {shared}",
        "test": f"20% {shared}; fold {fold} of {folds.FOLDS}, fixed",
    }


def _split_dev(
    protocol: Protocol, parts: Mapping[str, list[Utterance]], seed: int, fraction: float
) -> tuple[dict[str, list[Utterance]], str]:
    train = parts["train"]
    unit = "document and text" if protocol.partition == "documents" else grouping.unit_of(train)
    groups = grouping.group(train, unit)
    held = grouping.choose(groups, _labels(protocol, train), fraction, seed)
    made = _part(train, lambda row: "dev" if groups[row.uid] in held else "train")
    of_all = len(set(groups.values()))
    how = (
        f"made from train: {len(held)} of {of_all} groups by {unit}, "
        f"fraction {fraction:g}, seed {seed}"
    )
    return {**parts, **made}, how


def _part(
    utterances: list[Utterance], where: Callable[[Utterance], str]
) -> dict[str, list[Utterance]]:
    parts: dict[str, list[Utterance]] = defaultdict(list)
    for utterance in utterances:
        parts[where(utterance)].append(utterance)
    return dict(parts)


def _labels(protocol: Protocol, utterances: Sequence[Utterance]) -> dict[str, str]:
    labels = ((utterance.uid, protocol.gold(utterance)) for utterance in utterances)
    return {uid: label for uid, label in labels if label is not None}


def _refuse_fold(protocol: Protocol, fold: int | None) -> None:
    if fold is not None:
        raise ProtocolError(f"{protocol.name}: has no folds, got fold {fold}; leave it out")


def _speaker(utterance: Utterance) -> str:
    return utterance.speaker or ""


def _session(utterance: Utterance) -> str:
    return utterance.uid[:5]


# The table -------------------------------------------------------------------------------

SST5 = by_label(dict(zip("01234", FIVE, strict=True)))
SST2 = by_label({"0": "negative", "1": "negative", "2": None, "3": "positive", "4": "positive"})
FRIENDS8 = by_label({name: name for name in (*EKMAN, "non-neutral")})
SIGNS = by_label({"-": "negative", "*": "neutral", "+": "positive"})
TWEETS = ("anger", "joy", "optimism", "sadness")

ACCURACY_F1 = ("accuracy", "macro_f1")
WA_UA = ("accuracy", "unweighted_accuracy")


def _iemocap(merged: Mapping[str, str], kept: Sequence[str]) -> Gold:
    rest = dict.fromkeys(("fea", "sur", "dis", "oth", "xxx"))
    return only(by_label({**rest, **IEMOCAP, **merged}), kept)


def _ascii(utterance: Utterance) -> bool:
    return utterance.text.isascii()


def _tweeteval(name: str, labels: tuple[str, ...], n_test: int) -> Protocol:
    # The report prints accuracies; but always saying anger gives 0.82 where the other is rare.
    metrics = ACCURACY_F1 if labels == ("anger", "joy") else ("macro_f1", "accuracy")
    used_by = "TweetEval" if len(labels) == 4 else "the CNN report on tweets"
    gold = only(by_label({name: name for name in TWEETS}), labels)
    return Protocol(name, "tweeteval_emotion", labels, metrics, used_by, gold, n_test=n_test)


_FRIENDS_METRICS = ("accuracy", "macro_f1", "unweighted_accuracy")
_F4 = ("anger", "joy", "sadness", "neutral")
_I4 = ("anger", "happy", "sad", "neutral")
_I6 = ("happy", "sad", "neutral", "anger", "excited", "frustrated")
_E4 = ("anger", "happy", "neutral", "sad")
_LLM = "the LLM paper"
_M3ED_GOLD = by_label({name.capitalize(): name for name in M3ED})
_EMODB_GOLD = by_label(
    {"W": "anger", "F": "happy", "N": "neutral", "T": "sad", **dict.fromkeys("LEA")}
)


def _vader3(utterance: Utterance) -> str | None:
    is_tweet = utterance.uid.startswith("tweets/")
    return rated(utterance.score) if is_tweet and utterance.score is not None else None


def _cut3(score: float) -> str:
    return cut(score, (-0.1, 0.1), THREE)


def _cut5(score: float) -> str:
    return cut(score, (-0.7, -0.1, 0.1, 0.7), SIMS_FIVE)


_NONZERO = by_score(lambda score: sign(score) if score else None)
_NONNEG = by_score(lambda score: "negative" if score < 0 else "non-negative")
_NONPOS = by_score(lambda score: "positive" if score > 0 else "non-positive")

# The first protocol of a corpus is its default.
# fmt: off
_PROTOCOLS = (
    Protocol("sst2", "sst", POLARITY, ACCURACY_F1, "SST papers", SST2, n_test=1821),
    Protocol("sst5", "sst", FIVE, ACCURACY_F1, "SST papers", SST5, n_test=2210),
    # The only sizes that fit the accuracies the LLM paper prints: the 10 test sentences
    # that are not ASCII are missing from them.
    Protocol("sst2-ascii", "sst", POLARITY, ("accuracy",), _LLM, SST2, n_test=1811, in_test=_ascii),
    Protocol("sst5-ascii", "sst", FIVE, ("accuracy",), _LLM, SST5, n_test=2200, in_test=_ascii),
    Protocol("friends7", "friends", EKMAN, _FRIENDS_METRICS, "default", only(FRIENDS8, EKMAN),
             n_test=2223),
    Protocol("friends8", "friends", (*EKMAN, "non-neutral"), _FRIENDS_METRICS, "all raw labels",
             FRIENDS8, n_test=2764),
    Protocol("friends4", "friends", _F4, WA_UA, "HiGRU, Pre-CODE", only(FRIENDS8, _F4),
             n_test=1837),
    Protocol("mastodon3", "mastodon", THREE, ACCURACY_F1, _LLM, SIGNS, n_test=1142),
    Protocol("mastodon-posneg", "mastodon", THREE, ("f1", "accuracy"), "DARER", SIGNS,
             averaged_over=("positive", "negative"), n_test=1142),
    Protocol("mosi2", "mosi", POLARITY, ACCURACY_F1, _LLM, _NONZERO, n_test=656),
    Protocol("mosi2-nonneg", "mosi", ("negative", "non-negative"), ("accuracy", "weighted_f1"),
             "MMSA has0", _NONNEG, n_test=686),
    Protocol("mosi3", "mosi", THREE, ACCURACY_F1, _LLM, by_score(sign), n_test=686),
    Protocol("mosi7", "mosi", SEVEN, ("accuracy",), "MMSA Acc-7", by_score(seven), n_test=686),
    Protocol("ch_sims2", "ch_sims", POLARITY, ACCURACY_F1, _LLM, _NONZERO, n_test=388),
    Protocol("ch_sims2-nonpos", "ch_sims", ("non-positive", "positive"),
             ("accuracy", "weighted_f1"), "MMSA, MLF-DNN", _NONPOS, n_test=457),
    Protocol("ch_sims3", "ch_sims", THREE, ("accuracy",), "MMSA", by_score(_cut3), n_test=457),
    Protocol("ch_sims5", "ch_sims", SIMS_FIVE, ("accuracy",), "MMSA", by_score(_cut5), n_test=457),
    Protocol("m3ed7", "m3ed", M3ED, ("weighted_f1", "accuracy", "unweighted_accuracy"), "M3ED",
             _M3ED_GOLD, n_test=4201),
    Protocol("meld7", "meld", EKMAN, ("weighted_f1", "accuracy"), "MELD",
             by_label({name: name for name in EKMAN}), n_test=2610),
    _tweeteval("tweeteval4", TWEETS, 1421),
    _tweeteval("tweeteval-anger-joy", ("anger", "joy"), 916),
    _tweeteval("tweeteval-anger-optimism", ("anger", "optimism"), 681),
    Protocol("iemocap4", "iemocap", _I4, WA_UA, "speech", _iemocap({"exc": "happy"}, _I4),
             partition="sessions"),
    Protocol("iemocap4-random", "iemocap", _I4, WA_UA, "He et al., random rows",
             _iemocap({"exc": "happy"}, _I4), partition="random"),
    Protocol("iemocap6", "iemocap", _I6, ("weighted_f1", "accuracy"), "text ERC",
             _iemocap({}, _I6), partition="fifth session"),
    Protocol("iemocap6-random", "iemocap", _I6, ACCURACY_F1, "Petec and Popoviciu, random rows",
             _iemocap({}, _I6), partition="random"),
    Protocol("emodb4", "emodb", _E4, WA_UA, "speech", _EMODB_GOLD, partition="speakers"),
    Protocol("emodb4-random", "emodb", _E4, WA_UA, "He et al., random rows", _EMODB_GOLD,
             partition="random"),
    Protocol("vader3", "vader", THREE, ("macro_f1", "accuracy"), "the quickstart", _vader3,
             partition="documents"),
)
# fmt: on
TABLE: Mapping[str, Protocol] = {protocol.name: protocol for protocol in _PROTOCOLS}
