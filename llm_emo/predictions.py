"""Predictions on disk: `<split>.predictions.jsonl`, the one file that every measure starts from.

The first line is a header object that says what made the file; then one object a row with uid,
gold, completion, label, outcome and probabilities. Text is UTF-8; a lone surrogate, which
UTF-8 cannot hold, is written as its JSON escape.

`journal.Journal` is the same file while it grows.
"""

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from llm_emo import metrics, protocols
from llm_emo.errors import JobFailed, PredictionsError, nearest
from llm_emo.types import Outcome, Prediction, Split
from llm_emo.validation import first_problem

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
_WITH_LABEL = frozenset({"exact", "alias", "contained", "scored"})
_KEYS = ("uid", "gold", "completion", "label", "outcome", "probabilities")
_SURROGATE = re.compile("[\ud800-\udfff]")


Mode = Literal["score", "generate", "classify"]
"""How labels came about; specialised models classify."""


class Header(BaseModel):
    """What made the predictions; predictions under different headers never share a file.

    `files` are the SHA-256 sums of the corpus files, `adapter` is the adapter's fingerprint,
    `versions` are those of the packages that matter to the numbers. `prompt` is the prompt's
    name and a hash of its text, `name@<12 hex digits>`. `settings` hashes what else of the
    recipe can change a row: data with its limits, history window, dtype, quantization, method,
    seed, how answers are read. `run`, `revision`, `adapter`, `prompt` and `settings` are null
    where there is none, as for a zero-shot run or a baseline.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: str
    dataset: str
    split: Split
    labels: tuple[str, ...]
    files: dict[str, str]
    run: str | None
    model: str
    revision: str | None
    adapter: str | None
    versions: dict[str, str]
    mode: Mode
    prompt: str | None
    settings: str | None = None


def write(path: Path, header: Header, predictions: Iterable[Prediction]) -> None:
    """Write a predictions file; either the whole file appears under `path`, or nothing does.

    Raises:
        PredictionsError: A prediction contradicts itself or the header, or a uid stands twice.
        JobFailed: The disk is full or cannot be written.
    """
    seen: set[str] = set()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(header_line(header))
            for number, prediction in enumerate(predictions, start=2):
                file.write(row_line(prediction, header.labels, seen, f"{path}, line {number}"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise disk_failed(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> tuple[Header, list[Prediction]]:
    """Return the header and the rows of a predictions file.

    Raises:
        PredictionsError: The file is missing or malformed; the message names file and line.
    """
    header, rows = stream(path)
    return header, [prediction for _, prediction in rows]


def stream(path: Path) -> tuple[Header, Iterator[tuple[int, Prediction]]]:
    """Return the header and, one at a time, the rows, each with the byte where its line begins.

    Raises:
        PredictionsError: The file is missing or malformed; of a row, when the row is reached.
    """
    read = lines(path)
    first = next(read, b"")
    header = _header(path, first)
    return header, _rows(path, read, len(first), header)


def rows_at(path: Path, places: Iterable[int]) -> Iterator[Prediction]:
    """Yield the rows whose lines begin at these bytes, as `stream` told them."""
    try:
        with path.open("rb") as file:
            for place in places:
                file.seek(place)
                yield _row(file.readline(), f"{path}, byte {place}")
    except OSError as error:
        raise _unreadable(path, error) from None


def header_line(header: Header) -> bytes:
    """Return the first line of a predictions file."""
    return _line(header.model_dump(mode="json"))


def row_line(prediction: Prediction, labels: Sequence[str], seen: set[str], place: str) -> bytes:
    """Return the line of a prediction, and add its uid to `seen`.

    Raises:
        PredictionsError: The prediction contradicts itself or `labels`, or its uid was seen.
    """
    _check(prediction, labels, seen, place)
    return _line(_as_json(prediction))


def report(
    header: Header,
    predictions: Sequence[Prediction],
    groups: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """Return what `evaluate --json` prints.

    The metrics of `metrics.Report.as_dict`, with protocol, dataset and split, how often each
    outcome occurred, how many rows have no gold label (those cannot be measured and are in no
    other number but the outcomes), and what the intervals resample: `ci_unit` is "dialogue", or
    "row" where none has two rows. `expected_rows` is the protocol's published number of rows of
    this split and `complete` whether all of them were measured; both are None where none is
    published.

    Args:
        header: What made the predictions; its protocol says which labels `f1` averages over.
        predictions: The rows.
        groups: The dialogue, speaker or document of each uid, to resample whole ones.

    Raises:
        EmoError: No row has a gold label.
        PredictionsError: A uid has no entry in `groups`.
    """
    protocol = protocols.get(header.protocol)
    rows = [(p, p.gold) for p in predictions if p.gold is not None]
    if groups is not None:
        for prediction, _ in rows:
            if prediction.uid not in groups:
                raise PredictionsError(
                    f"uid {prediction.uid!r} belongs to no row of dataset {header.dataset}; the "
                    "predictions were made on other files (compare the header's hashes)"
                )
    probabilities = [p.probabilities for p, _ in rows if p.probabilities is not None]
    measured = metrics.evaluate(
        [gold for _, gold in rows],
        [p.label for p, _ in rows],
        header.labels,
        groups=None if groups is None else [groups[p.uid] for p, _ in rows],
        # Calibration over some of the rows would be a number about other rows than the rest.
        probabilities=probabilities if len(probabilities) == len(rows) else None,
        averaged_over=protocol.averaged_over,
    ).as_dict()
    expected = protocol.expected_rows(header.split)
    outcomes = Counter(p.outcome for p in predictions)
    units = {p.uid if groups is None else groups[p.uid] or p.uid for p, _ in rows}
    return {
        "n": measured.pop("n"),
        "protocol": header.protocol,
        "dataset": header.dataset,
        "split": header.split,
        **measured,
        "outcomes": {outcome: outcomes[outcome] for outcome in OUTCOMES},
        "without_gold": len(predictions) - len(rows),
        "expected_rows": expected,
        "complete": None if expected is None else len(rows) == expected,
        "ci_unit": "row" if len(units) == len(rows) else "dialogue",
    }


def _check(prediction: Prediction, labels: Sequence[str], seen: set[str], place: str) -> None:
    """Refuse a prediction that contradicts itself; add its uid to `seen`."""

    def refuse(problem: str) -> PredictionsError:
        return PredictionsError(f"{place}: uid {prediction.uid!r}: {problem}")

    if prediction.uid in seen:
        raise refuse("stands twice; expected each uid once")
    for kind, label in (("gold", prediction.gold), ("label", prediction.label)):
        if label is not None and label not in labels:
            raise refuse(f"{kind} {label!r} is not in the label set; {nearest(label, labels)}")
    if prediction.outcome not in OUTCOMES:
        raise refuse(
            f"no outcome {prediction.outcome!r}; {nearest(str(prediction.outcome), OUTCOMES)}"
        )
    if (prediction.label is not None) != (prediction.outcome in _WITH_LABEL):
        expected = "a label" if prediction.outcome in _WITH_LABEL else "no label"
        raise refuse(
            f"outcome {prediction.outcome!r} with label {prediction.label!r}, expected {expected}"
        )
    if prediction.probabilities is not None:
        if set(prediction.probabilities) != set(labels):
            raise refuse(
                f"probabilities of {sorted(prediction.probabilities)}, expected of {sorted(labels)}"
            )
        values = prediction.probabilities.values()
        # Written so that NaN, which compares false with everything, is refused.
        if not all(0 <= value <= 1 for value in values) or not abs(sum(values) - 1) <= 1e-3:
            raise refuse(
                f"probabilities {dict(prediction.probabilities)}, expected numbers from "
                "0 to 1 whose sum is 1"
            )
    seen.add(prediction.uid)


def _rows(
    path: Path, lines: Iterable[bytes], begin: int, header: Header
) -> Iterator[tuple[int, Prediction]]:
    """Yield the predictions of all lines behind the header; the first begins at byte `begin`."""
    seen: set[str] = set()
    for number, line in enumerate(lines, start=2):
        place = f"{path}, line {number}"
        prediction = _row(line, place)
        _check(prediction, header.labels, seen, place)
        yield begin, prediction
        begin += len(line)


def _row(line: bytes, place: str) -> Prediction:
    """Return the prediction of a line."""
    data = _object(line, place)
    for key in data:
        if key not in _KEYS:
            raise PredictionsError(f"{place}: unknown key {key!r}; {nearest(key, _KEYS)}")
    for key in _KEYS:
        if key not in data:
            raise PredictionsError(f"{place}: missing key {key!r}")
        value = data[key]
        optional = key not in ("uid", "outcome")
        if key != "probabilities" and not (isinstance(value, str) or (optional and value is None)):
            raise PredictionsError(
                f"{place}: key {key!r}: found {value!r}, expected "
                f"{'a string or null' if optional else 'a string'}"
            )
    probabilities = data["probabilities"]
    if probabilities is not None and not (
        isinstance(probabilities, dict)
        and all(type(value) in (int, float) for value in probabilities.values())
    ):
        raise PredictionsError(
            f"{place}: key 'probabilities': found {probabilities!r}, expected an object of "
            "numbers or null"
        )
    return Prediction(**{key: data[key] for key in _KEYS})


def _header(path: Path, line: bytes) -> Header:
    """Return the header, which is the first line."""
    if not line:
        raise PredictionsError(f"{path}: is empty, expected a header line; predict again")
    place = f"{path}, line 1"
    data = _object(line, place)
    if "uid" in data:
        raise PredictionsError(f"{place}: found a prediction, expected the header; predict again")
    try:
        return Header.model_validate(data)
    except ValidationError as error:
        raise PredictionsError(f"{place}: {first_problem(error, Header)}") from None


def _object(line: bytes, place: str) -> dict[str, Any]:
    """Return the JSON object of a line; neither NaN nor a doubled key passes."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not a number of JSON")

    def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) != len(pairs):
            raise ValueError("a key stands twice")
        return data

    try:
        data = json.loads(
            line.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=no_doubles
        )
    except ValueError as error:  # also what json and UTF-8 raise
        raise PredictionsError(f"{place}: is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise PredictionsError(f"{place}: found {data!r}, expected an object")
    return data


def _as_json(prediction: Prediction) -> dict[str, Any]:
    """Return the row's object, its keys in the file's order."""
    data = {key: getattr(prediction, key) for key in _KEYS}
    if prediction.probabilities is not None:
        data["probabilities"] = {k: float(v) for k, v in prediction.probabilities.items()}
    return data


def _line(data: dict[str, Any]) -> bytes:
    """Return one line of JSON in UTF-8."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return _SURROGATE.sub(lambda m: f"\\u{ord(m.group()):04x}", text).encode() + b"\n"


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a predictions file, each with its line feed if it has one.

    Raises:
        PredictionsError: It does not exist, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> PredictionsError:
    if isinstance(error, FileNotFoundError):
        return PredictionsError(f"no predictions file {path}; make it with llm-emo predict")
    return PredictionsError(f"{path}: cannot be read: {error.strerror}")


def disk_failed(path: Path, error: OSError) -> JobFailed:
    """Return the one message for a disk that is full or cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return JobFailed(
        f"{path}: cannot be written: {error.strerror}; what was written before is kept; "
        f"{'make room' if full else 'make the folder writable'} and run the same command again"
    )
