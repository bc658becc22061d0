"""Laws of the measures; scikit-learn is the witness where no answer is unparsed."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from llm_emo import metrics
from llm_emo.errors import EmoError, ProtocolError

LABELS = ("joy", "anger", "fear", "neutral")
label = st.sampled_from(LABELS)
parsed_rows = st.lists(st.tuples(label, label), min_size=1, max_size=30)
any_rows = st.lists(st.tuples(label, st.none() | label), min_size=1, max_size=30)
AVERAGES = ("accuracy", "macro_f1", "weighted_f1", "unweighted_accuracy", "parse_rate")


def columns(rows: Sequence[tuple[str, Any]]) -> tuple[list[str], list[Any]]:
    return [gold for gold, _ in rows], [predicted for _, predicted in rows]


@given(rows=parsed_rows)
def test_parsed_answers_score_as_in_scikit_learn(rows: list[tuple[str, str]]) -> None:
    gold, predicted = columns(rows)
    report = metrics.evaluate(gold, predicted, LABELS, averaged_over=LABELS[:2], bootstrap=0)

    def f1(average: str, labels: Sequence[str] = LABELS) -> float:
        return float(f1_score(gold, predicted, labels=labels, average=average, zero_division=0))

    assert report.accuracy == pytest.approx(accuracy_score(gold, predicted))
    assert report.macro_f1 == pytest.approx(f1("macro"))
    assert report.weighted_f1 == pytest.approx(f1("weighted"))
    assert report.f1 == pytest.approx(f1("macro", LABELS[:2]))
    assert report.parse_rate == 1
    # balanced_accuracy_score warns of predicted labels that have no gold row, and skips them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        assert report.unweighted_accuracy == pytest.approx(balanced_accuracy_score(gold, predicted))
    assert [list(row[:-1]) for row in report.confusion] == confusion_matrix(
        gold, predicted, labels=LABELS
    ).tolist()
    witness = precision_recall_fscore_support(gold, predicted, labels=LABELS, zero_division=0)
    for name, *values in zip(LABELS, *witness, strict=True):
        assert list(report.per_class[name].values()) == pytest.approx(values)


@given(rows=any_rows)
def test_an_unparsed_answer_is_wrong_and_never_dropped(rows: list[tuple[str, str | None]]) -> None:
    gold, predicted = columns(rows)
    report = metrics.evaluate(gold, predicted, LABELS, bootstrap=0)
    right = sum(a == b for a, b in rows)
    unparsed = predicted.count(None)
    assert report.n == len(rows)
    assert report.accuracy == pytest.approx(right / len(rows))
    assert report.parse_rate == pytest.approx(1 - unparsed / len(rows))
    assert sum(map(sum, report.confusion)) == len(rows)
    assert sum(row[-1] for row in report.confusion) == unparsed
    assert [sum(row) for row in report.confusion] == [gold.count(name) for name in LABELS]


@given(rows=any_rows)
def test_dropping_unparsed_answers_would_flatter(rows: list[tuple[str, str | None]]) -> None:
    kept = [row for row in rows if row[1] is not None]
    assume(kept and len(kept) < len(rows) and any(a == b for a, b in kept))
    honest = metrics.evaluate(*columns(rows), LABELS, bootstrap=0)
    dropped = metrics.evaluate(*columns(kept), LABELS, bootstrap=0)
    assert honest.accuracy < dropped.accuracy
    assert honest.macro_f1 <= dropped.macro_f1


@given(rows=any_rows)
def test_a_single_metric_equals_the_reports(rows: list[tuple[str, str | None]]) -> None:
    gold, predicted = columns(rows)
    report = metrics.evaluate(gold, predicted, LABELS, averaged_over=["joy"], bootstrap=0)
    for metric in metrics.METRICS:
        one = metrics.point(gold, predicted, LABELS, metric, averaged_over=["joy"])
        assert one == pytest.approx(getattr(report, metric))


@given(rows=any_rows, data=st.data())
def test_the_order_of_rows_changes_no_metric(
    rows: list[tuple[str, str | None]], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(rows))
    assert metrics.evaluate(*columns(rows), LABELS, bootstrap=5) == metrics.evaluate(
        *columns(shuffled), LABELS, bootstrap=5
    )


def test_a_label_without_rows_and_predictions_counts_as_zero_in_macro_f1_but_not_in_ua() -> None:
    report = metrics.evaluate(["joy", "anger"], ["joy", "anger"], LABELS, bootstrap=0)
    assert report.macro_f1 == pytest.approx(0.5)
    assert report.unweighted_accuracy == 1
    assert report.weighted_f1 == 1
    assert report.per_class["fear"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}


def test_averaging_over_some_labels_keeps_the_rows_of_the_others() -> None:
    labels = ("positive", "negative", "neutral")
    gold = ["positive", "negative", "neutral", "neutral"]
    predicted = ["positive", "negative", "positive", "neutral"]
    over = ("positive", "negative")
    assert metrics.point(gold, predicted, labels, "f1", over) == pytest.approx((2 / 3 + 1) / 2)
    with pytest.raises(ProtocolError, match="needs the labels whose F1 it averages"):
        metrics.point(gold, predicted, labels, "f1")
    with pytest.raises(ProtocolError, match="'positiv' is not a label; did you mean 'positive'"):
        metrics.point(gold, predicted, labels, "f1", ["positiv"])


@pytest.mark.parametrize(
    ("gold", "predicted", "message"),
    [
        (["joy", "angr"], ["joy", "joy"], "row 1 .*: gold label 'angr' .* did you mean 'anger'"),
        (["joy", "joy"], ["joy", "jo"], "row 1 .*: predicted label 'jo' .* did you mean 'joy'"),
        (["joy", None], ["joy", "joy"], "row 1 .*: gold label None"),
        ([], [], "found 0 rows"),
    ],
)
def test_rows_that_cannot_be_measured_are_refused(
    gold: list[str], predicted: list[str], message: str
) -> None:
    with pytest.raises(EmoError, match=message):
        metrics.evaluate(gold, predicted, LABELS)
    with pytest.raises(EmoError, match=message):
        metrics.point(gold, predicted, LABELS, "accuracy")


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ProtocolError, match="did you mean 'macro_f1'"):
        metrics.point(["joy"], ["joy"], LABELS, "macrof1")


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 gold labels but 1 predictions"):
        metrics.evaluate(["joy", "joy"], ["joy"], LABELS)
    with pytest.raises(ValueError, match="1 rows but 2 groups"):
        metrics.evaluate(["joy"], ["joy"], LABELS, groups=["a", "b"])
    with pytest.raises(ValueError, match="1 rows but 0 sets of probabilities"):
        metrics.evaluate(["joy"], ["joy"], LABELS, probabilities=[])


def noisy(n: int, right: float, seed: int = 0) -> tuple[list[str], list[str | None]]:
    generator = np.random.default_rng(seed)
    gold = [LABELS[i] for i in generator.integers(len(LABELS), size=n)]
    return gold, [a if b else None for a, b in zip(gold, generator.random(n) < right, strict=True)]


def test_the_interval_of_accuracy_is_the_binomial_one() -> None:
    n, right = 4000, 0.7
    report = metrics.evaluate(*noisy(n, right), LABELS, bootstrap=4000)
    half = 1.96 * (report.accuracy * (1 - report.accuracy) / n) ** 0.5
    expected = (report.accuracy - half, report.accuracy + half)
    assert report.ci["accuracy"] == pytest.approx(expected, abs=2e-3)


@given(rows=any_rows)
def test_every_interval_lies_within_0_and_1_and_in_order(
    rows: list[tuple[str, str | None]],
) -> None:
    report = metrics.evaluate(*columns(rows), LABELS, bootstrap=50)
    assert set(report.ci) == set(AVERAGES)
    assert all(0 <= low <= high <= 1 + 1e-12 for low, high in report.ci.values())


def test_intervals_repeat_under_a_seed_and_change_with_it() -> None:
    gold, predicted = noisy(200, 0.6)
    first, second, other = (
        metrics.evaluate(gold, predicted, LABELS, seed=seed).ci for seed in (1, 1, 2)
    )
    assert first == second != other


def test_groups_of_one_row_give_the_intervals_of_rows() -> None:
    gold, predicted = noisy(500, 0.6)
    rows = metrics.evaluate(gold, predicted, LABELS, bootstrap=4000)
    for groups in ([str(i) for i in range(500)], [None] * 500):
        groups_of_one = metrics.evaluate(gold, predicted, LABELS, groups=groups, bootstrap=4000)
        for metric in AVERAGES:
            assert groups_of_one.ci[metric] == pytest.approx(rows.ci[metric], abs=0.01)


def test_rows_that_repeat_within_a_group_widen_the_interval() -> None:
    gold, predicted = noisy(100, 0.6)
    copies = 9
    groups = [str(i) for i in range(100) for _ in range(copies)]
    gold = [a for a in gold for _ in range(copies)]
    predicted = [a for a in predicted for _ in range(copies)]

    def width(**options: Any) -> float:
        low, high = metrics.evaluate(gold, predicted, LABELS, **options).ci["accuracy"]
        return high - low

    # Nine copies carry the information of one: a third of the width would be a false promise.
    assert width(groups=groups) == pytest.approx(3 * width(), rel=0.15)


def test_one_group_gives_an_interval_of_no_width() -> None:
    report = metrics.evaluate(*noisy(50, 0.5), LABELS, groups=["one"] * 50)
    assert report.ci["accuracy"] == (report.accuracy, report.accuracy)


def test_a_thousand_resamples_of_four_thousand_rows_take_less_than_two_seconds() -> None:
    gold, predicted = noisy(4000, 0.7)
    groups = [str(i // 3) for i in range(4000)]
    metrics.evaluate(gold[:10], predicted[:10], LABELS, bootstrap=1)  # imports scikit-learn
    started = time.perf_counter()
    metrics.evaluate(gold, predicted, LABELS, groups=groups)
    assert time.perf_counter() - started < 2


def certain(answer: str, p: float) -> dict[str, float]:
    return {name: p if name == answer else (1 - p) / (len(LABELS) - 1) for name in LABELS}


def test_confidence_that_comes_true_has_no_calibration_error() -> None:
    gold = ["joy"] * 3 + ["anger"]
    probabilities = [certain("joy", 0.75)] * 4
    report = metrics.evaluate(gold, ["joy"] * 4, LABELS, probabilities=probabilities)
    assert report.ece == pytest.approx(0)


def test_calibration_error_weights_the_gap_of_each_bin_by_its_rows() -> None:
    gold = ["joy", "joy", "joy", "anger"]
    probabilities = [certain("joy", 1.0)] * 2 + [certain("joy", 0.5), certain("joy", 0.99)]
    report = metrics.evaluate(gold, ["joy"] * 4, LABELS, probabilities=probabilities)
    # Bin (14/15, 1]: two right of three, confidence 2.99 / 3. Bin of 0.5: right.
    assert report.ece == pytest.approx((abs(2 - 2.99) + abs(1 - 0.5)) / 4)


def test_probabilities_of_other_labels_are_refused() -> None:
    with pytest.raises(ProtocolError, match=r"row 0 .*: probabilities of"):
        metrics.evaluate(["joy"], ["joy"], LABELS, probabilities=[{"joy": 1.0}])


def test_the_json_of_a_report_has_the_contracts_keys() -> None:
    report = metrics.evaluate(["joy"], ["joy"], LABELS).as_dict()
    assert list(report) == [
        "n",
        "accuracy",
        "macro_f1",
        "weighted_f1",
        "unweighted_accuracy",
        "parse_rate",
        "per_class",
        "confusion",
        "ci",
        "ece",
    ]
    over = metrics.evaluate(["joy"], ["joy"], LABELS, averaged_over=["joy"]).as_dict()
    assert over["f1"] == 1
    assert over["ci"]["f1"] == [1, 1]
