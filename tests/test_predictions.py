"""Laws of predictions files: nothing is lost, doubled, or contradicts itself."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_emo import metrics, predictions
from llm_emo.errors import EmoError, PredictionsError
from llm_emo.journal import Journal
from llm_emo.predictions import Header
from llm_emo.types import Prediction

LABELS = ("negative", "neutral", "positive")
HEADER = Header(
    protocol="mastodon3",
    dataset="mastodon",
    split="test",
    labels=LABELS,
    files={"test.txt": "0" * 64},
    run="r1",
    model="smollm2-135m",
    revision=None,
    adapter="f" * 16,
    versions={"llm_emo": "0.1.0"},
    mode="generate",
    prompt="paper",
)
EVEN = dict.fromkeys(LABELS, 1 / 3)


def prediction(uid: str, label: str | None = "positive", **changes: Any) -> Prediction:
    fields: dict[str, Any] = {
        "uid": uid,
        "gold": "positive",
        "label": label,
        "outcome": "exact" if label else "none",
        "completion": "Positive",
    }
    return Prediction(**{**fields, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "test.predictions.jsonl"


@given(
    texts=st.dictionaries(
        st.text(),
        st.none() | st.text(st.characters(exclude_categories=[])),
        max_size=5,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_written_is_read_again(path: Path, texts: dict[str, str | None]) -> None:
    # Two halves of a pair that stand apart in Python are one character to every JSON reader.
    texts = {
        uid: text and text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        for uid, text in texts.items()
    }
    rows = [
        prediction(uid, completion=text, probabilities=EVEN if text else None)
        for uid, text in texts.items()
    ]
    predictions.write(path, HEADER, rows)
    assert predictions.read(path) == (HEADER, rows)


def test_the_file_is_a_header_and_one_object_a_row(path: Path) -> None:
    predictions.write(path, HEADER, [prediction("ä", completion="好\u2028\ud800")])
    text = path.read_text(encoding="utf-8")
    first, second, rest = text.split("\n")
    assert rest == ""
    assert json.loads(first)["protocol"] == "mastodon3"
    assert list(json.loads(second)) == [
        "uid",
        "gold",
        "completion",
        "label",
        "outcome",
        "probabilities",
    ]
    assert "ä" in second
    assert "好" in second
    assert "\\ud800" in second


def test_a_failed_write_leaves_the_old_file_and_no_other(path: Path) -> None:
    predictions.write(path, HEADER, [prediction("a")])
    with pytest.raises(PredictionsError, match="uid 'b': stands twice"):
        predictions.write(path, HEADER, [prediction("b"), prediction("b")])
    assert [p.uid for p in predictions.read(path)[1]] == ["a"]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "positiv"}, "label 'positiv' is not in the label set; did you mean 'positive'"),
        ({"gold": "good"}, "gold 'good' is not in the label set"),
        ({"outcome": "none"}, "outcome 'none' with label 'positive', expected no label"),
        ({"label": None, "outcome": "exact"}, "outcome 'exact' with label None, expected a label"),
        ({"outcome": "exactly"}, "no outcome 'exactly'; did you mean 'exact'"),
        ({"probabilities": {"positive": 1.0}}, "probabilities of .*, expected of"),
        ({"probabilities": dict.fromkeys(LABELS, 0.3)}, "whose sum is 1"),
        ({"probabilities": dict(zip(LABELS, (-0.5, 0.5, 1.0), strict=True))}, "from 0 to 1"),
        ({"probabilities": dict.fromkeys(LABELS, float("nan"))}, "whose sum is 1"),
    ],
)
def test_a_prediction_that_contradicts_itself_is_neither_written_nor_read(
    path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PredictionsError, match=message):
        predictions.write(path, HEADER, [prediction("a", **changes)])
    assert not path.exists()
    with Journal(path, HEADER) as journal, pytest.raises(PredictionsError, match=message):
        journal.append(prediction("a", **changes))
    if "nan" in str(changes):
        message = "NaN is not a number of JSON"
    spoil(path, lambda row: {**row, **changes})
    with pytest.raises(PredictionsError, match=f"line 3.*{message}"):
        predictions.read(path)


def spoil(path: Path, change: Any) -> None:
    """Write a header and two rows, the second one changed."""
    good = {
        "uid": "a",
        "gold": "positive",
        "completion": "x",
        "label": "positive",
        "outcome": "exact",
        "probabilities": None,
    }
    lines = [HEADER.model_dump(mode="json"), good, change({**good, "uid": "b"})]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {**row, "uid": "a"}, "uid 'a': stands twice"),
        (lambda row: {k: v for k, v in row.items() if k != "gold"}, "missing key 'gold'"),
        (lambda row: {**row, "lable": "x"}, "unknown key 'lable'; did you mean 'label'"),
        (lambda row: {**row, "uid": 3}, "key 'uid': found 3, expected a string"),
        (lambda row: {**row, "label": 3}, "key 'label': found 3, expected a string or null"),
        (lambda row: {**row, "probabilities": [1]}, "found .1., expected an object of numbers"),
        (lambda row: {**row, "probabilities": {"a": True}}, "expected an object of numbers"),
        (lambda _: ["x"], "found .'x'., expected an object"),
    ],
)
def test_a_malformed_row_is_refused_by_file_and_line(path: Path, change: Any, message: str) -> None:
    spoil(path, change)
    with pytest.raises(PredictionsError, match=message) as error:
        predictions.read(path)
    assert f"{path}, line 3" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n", "line 1: is not JSON"),
        (b"{", "line 1: is not JSON"),
        (b"\xff", "line 1: is not JSON.*utf-8"),
        (b'{"uid": "a"}', "line 1: found a prediction, expected the header"),
        (b'{"protocl": "a"}', "line 1: unknown key 'protocl'; did you mean 'protocol'"),
        (b'{"protocol": "a"}', "line 1: missing key 'dataset'"),
        (b'{"split": "a", "split": "b"}', "a key stands twice"),
    ],
)
def test_a_file_without_a_good_header_is_refused(path: Path, content: bytes, message: str) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(PredictionsError, match=message):
        predictions.read(path)


def test_a_missing_file_says_how_to_make_it(path: Path) -> None:
    with pytest.raises(PredictionsError, match="make it with llm-emo predict"):
        predictions.read(path)


def test_a_report_is_the_contracts_object_with_outcome_counts() -> None:
    rows = [
        prediction("a", outcome="scored", probabilities=EVEN),
        prediction("b", "negative", outcome="scored", probabilities=EVEN),
    ]
    report = predictions.report(HEADER, rows)
    assert list(report)[:5] == ["n", "protocol", "dataset", "split", "accuracy"]
    assert report["n"] == 2
    assert report["protocol"] == "mastodon3"
    assert report["accuracy"] == 0.5
    assert report["outcomes"]["scored"] == 2
    assert sum(report["outcomes"].values()) == 2
    assert report["ece"] is not None
    json.dumps(report, allow_nan=False)


def test_a_report_averages_over_the_protocols_labels() -> None:
    header = HEADER.model_copy(update={"protocol": "mastodon-posneg"})
    rows = [prediction("a"), prediction("b", "neutral", gold="negative")]
    expected = metrics.point(
        ["positive", "negative"], ["positive", "neutral"], LABELS, "f1", ("positive", "negative")
    )
    assert predictions.report(header, rows)["f1"] == expected
    assert "f1" not in predictions.report(HEADER, rows)


def test_rows_without_gold_are_counted_and_not_measured() -> None:
    report = predictions.report(HEADER, [prediction("a"), prediction("b", gold=None)])
    assert (report["n"], report["without_gold"], report["ece"]) == (1, 1, None)
    with pytest.raises(EmoError, match="found 0 rows"):
        predictions.report(HEADER, [prediction("b", gold=None)])


def test_a_report_resamples_whole_groups() -> None:
    rows = [prediction("a"), prediction("b", "negative")]
    report = predictions.report(HEADER, rows, groups={"a": "d", "b": "d"})
    assert report["ci"]["accuracy"] == [0.5, 0.5]
    assert report["ci_unit"] == "dialogue"
    alone = predictions.report(HEADER, rows, groups={"a": "c", "b": "d"})
    assert alone["ci_unit"] == predictions.report(HEADER, rows)["ci_unit"] == "row"
    with pytest.raises(PredictionsError, match="uid 'b' belongs to no row of dataset mastodon"):
        predictions.report(HEADER, rows, groups={"a": "d"})


def test_a_report_says_whether_it_covers_the_published_test_split() -> None:
    header = HEADER.model_copy(update={"protocol": "ch_sims3", "dataset": "ch_sims"})
    whole = [prediction(str(number)) for number in range(457)]

    def told(rows: list[Prediction], **changes: Any) -> tuple[int | None, bool | None]:
        report = predictions.report(header.model_copy(update=changes), rows)
        return report["expected_rows"], report["complete"]

    assert told(whole) == (457, True)
    assert told(whole[1:]) == (457, False)
    assert told([*whole[1:], prediction("x", gold=None)]) == (457, False)
    assert told(whole, split="dev") == (None, None)
    assert told(whole, protocol="vader3") == (None, None)
