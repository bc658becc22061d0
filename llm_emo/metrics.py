"""Measure predictions: what an unparsed answer costs, and how sure a number is.

An unparsed answer (predicted label None) is wrong: it stands in the denominator of accuracy
and recall, in a column of its own in the confusion matrix, and is never dropped.

Definitions, for a protocol's k labels (over scikit-learn, `zero_division=0`):

accuracy             share of rows whose label is right (WA in speech papers)
macro_f1             mean of the k F1 values; a label that occurs neither in the gold labels nor
                     among the predictions has F1 = 0 and counts: the classes are the protocol's,
                     not those that a sample happens to hold
weighted_f1          mean of the F1 values, weighted by the gold count
unweighted_accuracy  mean recall of the labels that have gold rows (UA)
f1                   mean F1 of the labels `averaged_over`, for protocols that leave labels out of
                     the mean (but not out of the rows)
parse_rate           share of rows whose answer gave a label
ece                  expected calibration error: 15 bins of equal width on the probability of the
                     most probable label, right edges included; mean of |accuracy - confidence|
                     weighted by the rows of a bin (Guo et al., 2017)

Intervals are 95 % percentile bootstrap intervals. With `groups` whole groups (dialogues,
speakers) are drawn, because rows of one group are not independent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_emo.errors import EmoError, ProtocolError, nearest

METRICS = (
    "accuracy",
    "macro_f1",
    "weighted_f1",
    "unweighted_accuracy",
    "f1",
    "parse_rate",
)

_ECE_BINS = 15

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Report:
    """What `evaluate` found; `as_dict` is its JSON.

    `per_class` maps a label to precision, recall, f1 and support. `confusion` has a row for each
    gold label and a column for each predicted one, then one for unparsed answers. `ci` maps a
    metric to its interval. `f1` is None unless labels to average over were named, `ece` is None
    without probabilities.
    """

    n: int
    accuracy: float
    macro_f1: float
    weighted_f1: float
    unweighted_accuracy: float
    f1: float | None
    parse_rate: float
    per_class: Mapping[str, Mapping[str, float]]
    confusion: tuple[tuple[int, ...], ...]
    ci: Mapping[str, tuple[float, float]]
    ece: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON holds it; `f1` is left out where it is not defined."""
        report: dict[str, Any] = {
            "n": self.n,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "weighted_f1": self.weighted_f1,
            "unweighted_accuracy": self.unweighted_accuracy,
            "f1": self.f1,
            "parse_rate": self.parse_rate,
            "per_class": {label: dict(values) for label, values in self.per_class.items()},
            "confusion": [list(row) for row in self.confusion],
            "ci": {metric: list(interval) for metric, interval in self.ci.items()},
            "ece": self.ece,
        }
        if self.f1 is None:
            del report["f1"]
        return report


def evaluate(
    gold: Sequence[str],
    predicted: Sequence[str | None],
    labels: Sequence[str],
    *,
    groups: Sequence[str | None] | None = None,
    probabilities: Sequence[Mapping[str, float]] | None = None,
    averaged_over: Sequence[str] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Report:
    """Compare predicted labels with gold labels, row by row.

    Args:
        gold: The right label of each row.
        predicted: The label read from each answer; None where there is none.
        labels: The protocol's labels; they order classes and confusion.
        groups: The dialogue, speaker or document of each row; None is a group of its own.
        probabilities: The probability of each label, for each row; asks for `ece`.
        averaged_over: The labels of the mean F1 that `f1` is.
        bootstrap: How many resamples the intervals rest on; 0 makes none.
        seed: Of the resampling.

    Raises:
        ProtocolError: A gold or predicted label is not one of `labels`.
        EmoError: There is no row.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    gold_ids, predicted_ids = _ids(gold, predicted, labels)
    over = _averaged_ids(averaged_over, labels)
    k = len(labels)
    # Gold has no unparsed row, so the last row of the square matrix is empty.
    confusion: Ints = confusion_matrix(gold_ids, predicted_ids, labels=range(k + 1))[:k]
    columns = precision_recall_fscore_support(
        gold_ids, predicted_ids, labels=range(k), zero_division=0.0
    )
    point = {metric: float(value) for metric, value in _scores(confusion, over).items()}
    resamples = _resamples(gold_ids, predicted_ids, k, groups, bootstrap, seed)
    return Report(
        n=len(gold),
        accuracy=point["accuracy"],
        macro_f1=point["macro_f1"],
        weighted_f1=point["weighted_f1"],
        unweighted_accuracy=point["unweighted_accuracy"],
        f1=point.get("f1"),
        parse_rate=point["parse_rate"],
        per_class={
            label: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
            for label, p, r, f, s in zip(labels, *columns, strict=True)
        },
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        ci=_intervals(_scores(resamples, over)) if bootstrap else {},
        ece=None if probabilities is None else _ece(gold, probabilities, labels),
    )


def point(
    gold: Sequence[str],
    predicted: Sequence[str | None],
    labels: Sequence[str],
    metric: str,
    averaged_over: Sequence[str] | None = None,
) -> float:
    """Return one metric of `METRICS`, without intervals: cheap enough for every evaluation step.

    Raises:
        ProtocolError: The metric is unknown, `f1` is asked without labels to average over, or a
            label is not one of `labels`.
        EmoError: There is no row.

    >>> point(["joy", "joy", "fear"], ["joy", None, "fear"], ["joy", "fear"], "accuracy")
    0.6666666666666666
    """
    if metric not in METRICS:
        raise ProtocolError(f"no metric {metric!r}; {nearest(metric, METRICS)}")
    gold_ids, predicted_ids = _ids(gold, predicted, labels)
    scores = _scores(
        _counts(gold_ids, predicted_ids, len(labels)), _averaged_ids(averaged_over, labels)
    )
    if metric not in scores:
        raise ProtocolError("metric 'f1' needs the labels whose F1 it averages (averaged_over)")
    return float(scores[metric])


def _ids(
    gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]
) -> tuple[Ints, Ints]:
    """Return both columns as label ids; an unparsed prediction is k. Shapes (n,), (n,)."""
    if len(gold) != len(predicted):
        raise ValueError(f"{len(gold)} gold labels but {len(predicted)} predictions")
    if not gold:
        raise EmoError("nothing to evaluate: found 0 rows, expected at least one with a gold label")
    position = {label: i for i, label in enumerate(labels)}
    for kind, column in (("gold", gold), ("predicted", predicted)):
        for row, label in enumerate(column):
            if label not in position and (label is not None or kind == "gold"):
                raise ProtocolError(
                    f"row {row} (counted from 0): {kind} label {label!r} is not a label of the "
                    f"protocol; {nearest(str(label), labels)}"
                )
    unparsed = len(labels)
    return (
        np.array([position[label] for label in gold], dtype=np.int64),
        np.array(
            [unparsed if label is None else position[label] for label in predicted], dtype=np.int64
        ),
    )


def _averaged_ids(averaged_over: Sequence[str] | None, labels: Sequence[str]) -> list[int] | None:
    """Return the ids of the labels that `f1` averages over."""
    if averaged_over is None:
        return None
    for label in averaged_over:
        if label not in labels:
            raise ProtocolError(
                f"averaged_over: {label!r} is not a label; {nearest(label, labels)}"
            )
    return [list(labels).index(label) for label in averaged_over]


def _counts(gold: Ints, predicted: Ints, k: int) -> Ints:
    """Return the confusion counts, shape (k, k + 1)."""
    return np.bincount(gold * (k + 1) + predicted, minlength=k * (k + 1)).reshape(k, k + 1)


def _scores(confusion: Ints, averaged_ids: Sequence[int] | None) -> dict[str, Floats]:
    """Return every metric of confusion counts of shape (..., k, k + 1); each of shape (...)."""
    counts = confusion.astype(np.float64)
    parsed = counts[..., :-1]
    right = np.diagonal(parsed, axis1=-2, axis2=-1)  # (..., k)
    support = counts.sum(axis=-1)  # (..., k)
    answered = parsed.sum(axis=-2)  # (..., k)
    total = support.sum(axis=-1)  # (...)
    recall = _ratio(right, support)
    f1 = _ratio(2 * right, support + answered)
    scores = {
        "accuracy": right.sum(axis=-1) / total,
        "macro_f1": f1.mean(axis=-1),
        "weighted_f1": (f1 * support).sum(axis=-1) / total,
        "unweighted_accuracy": recall.sum(axis=-1) / (support > 0).sum(axis=-1),
        "parse_rate": answered.sum(axis=-1) / total,
    }
    if averaged_ids is not None:
        scores["f1"] = f1[..., list(averaged_ids)].mean(axis=-1)
    return scores


def _ratio(part: Floats, whole: Floats) -> Floats:
    """Return part / whole, and 0 where both are 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _resamples(
    gold: Ints,
    predicted: Ints,
    k: int,
    groups: Sequence[str | None] | None,
    resamples: int,
    seed: int,
) -> Ints:
    """Draw rows, or whole groups, with replacement; return counts, shape (resamples, k, k + 1).

    Metrics depend on the confusion counts only. Drawing n rows is therefore one multinomial
    draw over the cells, and drawing groups is one over the groups, times the cells of each.
    """
    generator = np.random.default_rng(seed)
    if groups is None:
        cells = _counts(gold, predicted, k).ravel()
        drawn = generator.multinomial(len(gold), cells / cells.sum(), size=resamples)
        return drawn.reshape(resamples, k, k + 1)
    group_ids = _group_ids(groups, len(gold))
    n_groups = int(group_ids.max()) + 1
    cells_of = np.zeros((n_groups, k * (k + 1)))
    np.add.at(cells_of, (group_ids, gold * (k + 1) + predicted), 1)
    times = generator.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=resamples)
    # In floats, because integer products do not use BLAS; the counts stay exact.
    return np.rint(times.astype(np.float64) @ cells_of).astype(np.int64).reshape(-1, k, k + 1)


def _group_ids(groups: Sequence[str | None], n: int) -> Ints:
    """Return the number of each row's group; None is a group of its own. Shape (n,)."""
    if len(groups) != n:
        raise ValueError(f"{n} rows but {len(groups)} groups")
    numbers: dict[str | int, int] = {}
    return np.array(
        [
            numbers.setdefault(row if group is None else group, len(numbers))
            for row, group in enumerate(groups)
        ],
        dtype=np.int64,
    )


def _intervals(scores: Mapping[str, Floats]) -> dict[str, tuple[float, float]]:
    """Return the 2.5 and 97.5 percentiles of each metric's resamples."""
    intervals = {}
    for metric, values in scores.items():
        low, high = np.percentile(values, [2.5, 97.5])
        intervals[metric] = (float(low), float(high))
    return intervals


def _ece(
    gold: Sequence[str], probabilities: Sequence[Mapping[str, float]], labels: Sequence[str]
) -> float:
    """Return the expected calibration error of the most probable label."""
    if len(probabilities) != len(gold):
        raise ValueError(f"{len(gold)} rows but {len(probabilities)} sets of probabilities")
    for row, by_label in enumerate(probabilities):
        if set(by_label) != set(labels):
            raise ProtocolError(
                f"row {row} (counted from 0): probabilities of {sorted(by_label)}, expected of "
                f"{sorted(labels)}"
            )
    table = np.array([[by_label[label] for label in labels] for by_label in probabilities])
    confidence = table.max(axis=1)  # (n,)
    right = np.array([labels[i] for i in table.argmax(axis=1)]) == np.array(gold)
    bins = np.clip(np.ceil(confidence * _ECE_BINS).astype(np.int64) - 1, 0, _ECE_BINS - 1)
    # |sum of (right - confidence)| over a bin is its size times |accuracy - mean confidence|.
    gaps = np.bincount(bins, weights=right - confidence, minlength=_ECE_BINS)
    return float(np.abs(gaps).sum() / len(gold))
