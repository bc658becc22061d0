"""What a corpus is, and the few ways in which corpus files are opened.

A corpus module holds one constant, `CORPUS`. Its readers use the helpers below, so that
every complaint names the file, the place in it, what was found and what was expected.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_emo.errors import DatasetError
from llm_emo.types import SPLITS, Utterance

ALL = "all"
"""The one part of a corpus that publishes no splits."""

PARTS: tuple[str, ...] = (*SPLITS, ALL)


@dataclass(frozen=True)
class Layout:
    """One arrangement of files in which a corpus is handed out.

    `files` maps each part (train, dev, test, or all) to glob patterns below one of
    `bases`, of which the first is where users are told to put them; a part is there when
    every one of its patterns matches a file. `read` turns a base folder and a part into
    utterances. `extra` are files that enrich any part when they are there.
    """

    name: str
    files: Mapping[str, tuple[str, ...]]
    read: Callable[[Path, str], list[Utterance]]
    bases: tuple[str, ...] = (".",)
    extra: tuple[str, ...] = ()

    def parts(self, base: Path) -> tuple[str, ...]:
        """Return the parts whose files lie under `base`, in the order train, dev, test, all."""
        return tuple(
            part
            for part in PARTS
            if part in self.files and all(_matches(base, glob) for glob in self.files[part])
        )

    def base(self, folder: Path) -> Path | None:
        """Return the first of the bases under `folder` that holds any part."""
        return next(
            (folder / base for base in self.bases if self.parts(folder / base)),
            None,
        )

    def paths(self, base: Path, parts: Sequence[str]) -> list[Path]:
        """Return the files under `base` that `parts` are read from, sorted, each once."""
        globs = [glob for part in parts for glob in self.files[part]] + list(self.extra)
        return sorted({path for glob in globs for path in _matches(base, glob)})


@dataclass(frozen=True)
class Hub:
    """How a Hugging Face dataset of this corpus is read.

    `read` gets a `datasets.Dataset` and the name of the part. `refuse` returns a reason
    why a dataset of this id, with these features, is another corpus, or None.
    """

    example: str
    columns: tuple[str, ...]
    read: Callable[[Any, str], list[Utterance]]
    config: str | None = None
    refuse: Callable[[str, Mapping[str, Any]], str | None] = lambda hub, features: None


@dataclass(frozen=True)
class Corpus:
    """An annotated corpus: what it is, where it comes from, how its files are read.

    `layouts` are tried in order and the first whose files are found is taken. `obtain`
    fetches a corpus that has a fixed public source (and is called only when nothing is
    found under the data root); `cached` says where it lies if it was fetched before.
    """

    name: str
    title: str
    language: str
    license: str
    homepage: str
    how_to_get: str
    annotation: str
    layouts: tuple[Layout, ...]
    audio: bool = False
    hub: Hub | None = None
    obtain: Callable[[], Path] | None = None
    cached: Callable[[], Path | None] | None = None

    def find(self, root: Path | None) -> tuple[Layout, Path] | None:
        """Return the first layout that has files under `root/<name>`, with its base folder."""
        return next(iter(self.all_layouts(root)), None)

    def all_layouts(self, root: Path | None) -> list[tuple[Layout, Path]]:
        """Return every layout that has files under `root/<name>`, preferred one first."""
        if root is None:
            return []
        bases = [(layout, layout.base(root / self.name)) for layout in self.layouts]
        return [(layout, base) for layout, base in bases if base is not None]

    def absent(self, root: Path | None, part: str | None = None) -> DatasetError:
        """Return the error that names the missing file and how to get it.

        Where nothing is found, the file is named where `how_to_get` puts it: in the first base.
        """
        if root is None:
            return DatasetError(
                f"{self.name}: no data root was given; name the folder that holds "
                f"{self.name}/ (--data-root); {self.how_to_get}"
            )
        found = self.find(root)
        preferred = self.layouts[0]
        layout, base = found or (preferred, root / self.name / preferred.bases[0])
        if part is None:
            part = next(iter(layout.files))
        if part not in layout.files:
            there = ", ".join(layout.parts(base))
            return DatasetError(
                f"{self.name}: the {layout.name} in {base} have no {part} split (there: {there}); "
                f"{self.how_to_get}"
            )
        missing = [glob for glob in layout.files[part] if not _matches(base, glob)]
        return DatasetError(
            f"{self.name}: no file {base / (missing or list(layout.files[part]))[0]}; "
            f"{self.how_to_get}"
        )


def _matches(base: Path, glob: str) -> list[Path]:
    """Return the files under `base` that match, without hidden ones (macOS leaves `._name`)."""
    if not set(glob) & set("*?["):
        return [base / glob] if (base / glob).is_file() else []
    return [p for p in base.glob(glob) if p.is_file() and not p.name.startswith(".")]


def require_whole(name: str, parts: Mapping[str, Sequence[Utterance]]) -> None:
    """Hold that the rows of corpus `name` can be told apart, and that each has text and gold.

    Raises:
        DatasetError: a uid occurs twice, a text is empty, or a row has both or neither of
            label and score.
    """
    counts = Counter(row.uid for rows in parts.values() for row in rows)
    for part, rows in parts.items():
        for row in rows:
            where = f"{name}: {part} row {row.uid}"
            if counts[row.uid] > 1:
                raise DatasetError(f"{where}: the uid occurs {counts[row.uid]} times")
            if not row.text:
                raise DatasetError(f"{where}: the text is empty")
            if (row.label is None) == (row.score is None):
                raise DatasetError(f"{where}: expected a label or a score, and one of them only")


def malformed(path: Path, where: str, found: object, expected: str) -> DatasetError:
    """Return the error for a place in a file that is not as the format says."""
    shown = repr(found)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return DatasetError(f"{path}: {where}: found {shown}; expected {expected}")


def read_text(path: Path, encodings: Sequence[str] = ("utf-8-sig",)) -> str:
    """Return the text of `path`, decoded by the first of `encodings` that fits all of it.

    Raises:
        DatasetError: the file is absent, or fits none of the encodings.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from error
    for encoding in encodings:
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DatasetError(f"{path}: is not text in {' or '.join(encodings)}; is the file complete?")


def read_lines(path: Path, encodings: Sequence[str] = ("utf-8-sig",)) -> list[str]:
    r"""Return the lines of `path` without their ends (LF or CRLF); a final newline is optional.

    Not `str.splitlines`: that also breaks at U+0085, U+2028 and others, which occur inside
    real utterances, and would shift texts against their labels.
    """
    lines = read_text(path, encodings).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_json(path: Path) -> Any:
    """Return the JSON value in `path`.

    Raises:
        DatasetError: the file is absent, is not JSON, or an object has a key twice, of which
            Python would keep the last without a word.
    """

    def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        object_ = dict(pairs)
        if len(object_) != len(pairs):
            twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
            raise malformed(path, "an object", f"the key {twice!r} twice", "each key once")
        return object_

    try:
        return json.loads(read_text(path), object_pairs_hook=no_doubles)
    except json.JSONDecodeError as error:
        raise malformed(path, f"line {error.lineno}", error.msg, "JSON") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 5,000 brackets
        raise malformed(path, "the file", str(error), "JSON of a corpus") from error


def read_dialogues(path: Path) -> list[list[Any]]:
    """Return the dialogues in a JSON file, each a list of lines.

    Usually a list of lists. EmotionX files wrap the same lines: the file in an object that
    holds one list, and each dialogue in an object that holds one.
    """

    def inner(value: Any, where: str) -> list[Any]:
        if isinstance(value, dict):
            lists = [item for item in value.values() if isinstance(item, list)]
            value = lists[0] if len(lists) == 1 else value
        if not isinstance(value, list):
            raise malformed(path, where, value, "a list, or an object that holds one list")
        return value

    return [
        inner(dialogue, f"dialogue {number}")
        for number, dialogue in enumerate(inner(read_json(path), "top level"))
    ]


def read_csv(path: Path, encodings: Sequence[str] = ("utf-8-sig",)) -> list[list[str]]:
    """Return the rows of a comma-separated file as lists of text; quoted newlines survive.

    Raises:
        DatasetError: the file is absent, or no such file.
    """
    reader = csv.reader(io.StringIO(read_text(path, encodings), newline=""))
    try:
        return list(reader)
    except csv.Error as error:
        raise malformed(path, f"line {reader.line_num}", str(error), "comma-separated") from error


def as_dicts(
    path: Path, rows: Sequence[Sequence[str]], header: Sequence[str], required: Sequence[str]
) -> list[dict[str, str]]:
    """Return `rows` as dictionaries keyed by `header`, which must hold `required`.

    Raises:
        DatasetError: a required column is absent or stands twice, or a row has another number
            of cells.
    """
    for name in required:
        if header.count(name) != 1:
            raise malformed(path, "header", ",".join(header), f"one column {name!r}")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise malformed(path, f"row {number}", row, f"{len(header)} cells")
    return [dict(zip(header, row, strict=True)) for row in rows]


def parse_text(path: Path, where: str, text: object) -> str:
    """Return `text` without white space around it.

    Raises:
        DatasetError: it is no text, has nothing in it, or holds half a character (a lone
            surrogate, which JSON can spell and no file can hold).
    """
    if not isinstance(text, str) or not text.strip():
        raise malformed(path, where, text, "a text")
    return _whole(path, where, text.strip())


def parse_optional_text(path: Path, where: str, text: object) -> str | None:
    """Return `text`, or None where there is none; raises as `parse_text`."""
    if text is None or text == "":
        return None
    if not isinstance(text, str):
        raise malformed(path, where, text, "a text or nothing")
    return _whole(path, where, text)


def parse_name(path: Path, where: str, name: object) -> str:
    """Return `name`, an id that is a text or a whole number, as text; raises as `parse_text`."""
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    return parse_text(path, where, name)


def _whole(path: Path, where: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise malformed(path, where, text, "whole characters") from None
    return text


def parse_count(path: Path, where: str, text: str) -> int:
    """Return `text`, decimal digits, as a whole number.

    Raises:
        DatasetError: it is none, or has more than nine digits.
    """
    if not text.isdecimal() or len(text) > 9:
        raise malformed(path, where, text, "a whole number")
    return int(text)


def parse_number(path: Path, where: str, text: str, low: float, high: float) -> float:
    """Return `text` as a number in [low, high].

    Raises:
        DatasetError: it is no number, or lies outside (a NaN lies outside).
    """
    expected = f"a number from {low:g} to {high:g}"
    try:
        value = float(text)
    except ValueError:
        raise malformed(path, where, text, expected) from None
    if not low <= value <= high:
        raise malformed(path, where, text, expected)
    return value


def parse_choice(path: Path, where: str, text: object, choices: Sequence[str]) -> str:
    """Return `text` when it is one of `choices`.

    Raises:
        DatasetError: it is not.
    """
    if not isinstance(text, str) or text not in choices:
        raise malformed(path, where, text, "one of " + ", ".join(choices))
    return text
