"""Predictions on disk: `<split>.predictions.jsonl`, the one file that every measure starts from.

The first line is a header object that says what made the file; then one object a row with uid,
gold, completion, label, outcome and probabilities. Text is UTF-8; a lone surrogate, which
UTF-8 cannot hold, is written as its JSON escape.

`Journal` is the same file while it grows: `<split>.predictions.jsonl.partial` is only ever
appended to, so a job that dies loses at most the rows since its last flush, and continues.
"""

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from llm_emo import metrics
from llm_emo.errors import JobFailed, PredictionsError, nearest
from llm_emo.types import Outcome, Prediction, Split
from llm_emo.validation import first_problem

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
_WITH_LABEL = frozenset({"exact", "alias", "contained", "scored"})
_KEYS = ("uid", "gold", "completion", "label", "outcome", "probabilities")
_SURROGATE = re.compile("[\ud800-\udfff]")


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
    mode: Literal["score", "generate"]
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
            file.write(_line(header.model_dump(mode="json")))
            for number, prediction in enumerate(predictions, start=2):
                _check(prediction, header.labels, seen, f"{path}, line {number}")
                file.write(_line(_as_json(prediction)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _disk_failed(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> tuple[Header, list[Prediction]]:
    """Return the header and the rows of a predictions file.

    Raises:
        PredictionsError: The file is missing or malformed; the message names file and line.
    """
    lines = _read_bytes(path).split(b"\n")
    if lines[-1] == b"":  # what stands behind the last line feed
        lines.pop()
    return _header(path, lines), list(_rows(path, lines))


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
    from llm_emo import protocols

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


class Journal:
    """A predictions file that grows, and continues where a dead job left it.

    `done` are the uids that need no prediction any more. `note` says what was dropped when
    the file was opened, if anything. Call `flush` after each batch and `finish` at the end.

    >>> import tempfile
    >>> header = Header(protocol="p", dataset="d", split="test", labels=("joy", "fear"),
    ...     files={}, run=None, model="m", revision=None, adapter=None, versions={},
    ...     mode="generate", prompt="paper")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "test.predictions.jsonl"
    ...     with Journal(path, header) as journal:
    ...         journal.append(Prediction("b", "joy", None, "none", "Well."))
    ...     with Journal(path, header) as journal:
    ...         print(journal.done)
    ...         journal.append(Prediction("a", "joy", "joy", "exact", "Joy"))
    ...         journal.finish(["a", "b"])
    ...     [prediction.uid for prediction in read(path)[1]]
    {'b'}
    ['a', 'b']
    """

    def __init__(self, path: Path, header: Header) -> None:
        """Open `<path>.partial`, or begin it.

        Raises:
            PredictionsError: It was begun under another header, or a complete line is malformed.
            JobFailed: It cannot be written.
        """
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        self.header = header
        self.done: set[str] = set()
        self.note: str | None = None
        self._pending = bytearray()
        self._size = 0
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what is pending is ours to keep when the disk is full.
            self._file = self.partial.open("ab", buffering=0)
        except OSError as error:
            raise _disk_failed(self.partial, error) from None
        try:
            self._continue()
        except BaseException:
            self._file.close()
            raise

    def _continue(self) -> None:
        """Take over the complete lines that are there, and cut off a half-written one."""
        content = _read_bytes(self.partial)
        complete, line_feed, half = content.rpartition(b"\n")
        self._size = len(complete) + len(line_feed)
        if half:
            self.note = f"{self.partial}: dropped a half-written last line ({len(half)} bytes)"
            self._cut()
        if not line_feed:
            self._pending += _line(self.header.model_dump(mode="json"))
            self.flush()
            return
        lines = complete.split(b"\n")
        found = _header(self.partial, lines)
        if found != self.header:
            keys = [
                key
                for key in Header.model_fields
                if getattr(found, key) != getattr(self.header, key)
            ]
            raise PredictionsError(
                f"{self.partial}, line 1: was begun under another {', '.join(keys)}: found "
                f"{getattr(found, keys[0])!r}, expected {getattr(self.header, keys[0])!r}; "
                "delete the file to begin anew, or write to another folder"
            )
        self.done = {p.uid for p in _rows(self.partial, lines)}

    def append(self, prediction: Prediction) -> None:
        """Add a row; it is on disk after the next `flush`.

        Raises:
            PredictionsError: The prediction contradicts itself, or its uid is done already.
        """
        _check(prediction, self.header.labels, self.done, str(self.partial))
        self._pending += _line(_as_json(prediction))

    def flush(self) -> None:
        """Put what was appended on disk.

        Raises:
            JobFailed: The disk is full or failing. Complete lines stay as they were, and
                what is pending is kept for another try.
        """
        try:
            self._write_pending()
        except OSError as error:
            self._cut()
            raise _disk_failed(self.partial, error) from None
        self._size += len(self._pending)
        self._pending.clear()

    def finish(self, order_of_uids: Sequence[str]) -> None:
        """Write the final file, in the order of the split, and remove the partial one.

        Raises:
            PredictionsError: A uid of the split has no prediction, or one is of no row of it.
            JobFailed: The disk is full or failing; the partial file stays.
        """
        self.flush()
        _, rows = read(self.partial)
        by_uid = {prediction.uid: prediction for prediction in rows}
        twice = [uid for uid, count in Counter(order_of_uids).items() if count > 1]
        missing = [uid for uid in order_of_uids if uid not in by_uid]
        foreign = sorted(by_uid.keys() - set(order_of_uids))
        for uids, problem in (
            (twice, "stand twice in the split"),
            (missing, "have no prediction; run predict again to continue"),
            (foreign, "belong to no row of the split; the data changed, begin anew"),
        ):
            if uids:
                raise PredictionsError(
                    f"{self.partial}: {len(uids)} uids {problem} (the first: {uids[0]!r})"
                )
        write(self.path, self.header, (by_uid[uid] for uid in order_of_uids))
        self.close()
        self.partial.unlink()

    def close(self) -> None:
        """Flush and close; the file stays as it is, to be continued."""
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()

    def __enter__(self) -> Self:
        """Return the journal itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file, whatever happened."""
        self.close()

    def _write_pending(self) -> None:
        """Write and sync the pending bytes; a raw file may take them in several pieces."""
        written = 0
        while written < len(self._pending):
            written += self._file.write(self._pending[written:]) or 0
        os.fsync(self._file.fileno())

    def _cut(self) -> None:
        """Cut the file back to its complete lines."""
        os.ftruncate(self._file.fileno(), self._size)


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


def _rows(path: Path, lines: Sequence[bytes]) -> Iterator[Prediction]:
    """Yield the predictions of all lines behind the header."""
    header = _header(path, lines)
    seen: set[str] = set()
    for number, line in enumerate(lines[1:], start=2):
        place = f"{path}, line {number}"
        data = _object(line, place)
        for key in data:
            if key not in _KEYS:
                raise PredictionsError(f"{place}: unknown key {key!r}; {nearest(key, _KEYS)}")
        for key in _KEYS:
            if key not in data:
                raise PredictionsError(f"{place}: missing key {key!r}")
            value = data[key]
            optional = key not in ("uid", "outcome")
            if key != "probabilities" and not (
                isinstance(value, str) or (optional and value is None)
            ):
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
        prediction = Prediction(**{key: data[key] for key in _KEYS})
        _check(prediction, header.labels, seen, place)
        yield prediction


def _header(path: Path, lines: Sequence[bytes]) -> Header:
    """Return the header, which is the first line."""
    if not lines:
        raise PredictionsError(f"{path}: is empty, expected a header line; predict again")
    place = f"{path}, line 1"
    data = _object(lines[0], place)
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


def _read_bytes(path: Path) -> bytes:
    """Return the content of a file that must exist."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise PredictionsError(
            f"no predictions file {path}; make it with llm-emo predict"
        ) from None
    except OSError as error:
        raise PredictionsError(f"{path}: cannot be read: {error.strerror}") from None


def _disk_failed(path: Path, error: OSError) -> JobFailed:
    """Return the one message for a disk that is full or cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return JobFailed(
        f"{path}: cannot be written: {error.strerror}; what was written before is kept; "
        f"{'make room' if full else 'make the folder writable'} and run the same command again"
    )
