"""A predictions file while it grows: a job that dies continues where it was.

`<split>.predictions.jsonl.partial` is only ever appended to, so a dead job has lost at most the
rows since its last flush. When all are there, the file is written under its final name.

However many rows there are, of those behind it a journal remembers the uids alone.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from llm_emo.errors import PredictionsError
from llm_emo.predictions import (
    Header,
    disk_failed,
    header_line,
    lines,
    row_line,
    rows_at,
    stream,
    write,
)
from llm_emo.types import Prediction


class Journal:
    """A predictions file that grows, and continues where a dead job left it.

    `done` are the uids that need no prediction any more. `note` says what was dropped when
    the file was opened, if anything. Call `flush` after each batch and `finish` at the end.

    >>> import tempfile
    >>> from llm_emo.predictions import read
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
            raise disk_failed(self.partial, error) from None
        try:
            self._continue()
        except BaseException:
            self._file.close()
            raise

    def _continue(self) -> None:
        """Take over the complete lines that are there, and cut off a half-written one."""
        half = 0
        for line in lines(self.partial):
            if line.endswith(b"\n"):
                self._size += len(line)
            else:
                half = len(line)
        if half:
            self.note = f"{self.partial}: dropped a half-written last line ({half} bytes)"
            self._cut()
        if not self._size:
            self._pending += header_line(self.header)
            self.flush()
            return
        found, rows = stream(self.partial)
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
        self.done = {prediction.uid for _, prediction in rows}

    def append(self, prediction: Prediction) -> None:
        """Add a row; it is on disk after the next `flush`.

        Raises:
            PredictionsError: The prediction contradicts itself, or its uid is done already.
        """
        self._pending += row_line(prediction, self.header.labels, self.done, str(self.partial))

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
            raise disk_failed(self.partial, error) from None
        self._size += len(self._pending)
        self._pending.clear()

    def finish(self, order_of_uids: Sequence[str]) -> None:
        """Write the final file, in the order of the split, and remove the partial one.

        Raises:
            PredictionsError: A uid of the split has no prediction, or one is of no row of it.
            JobFailed: The disk is full or failing; the partial file stays.
        """
        self.flush()
        places: dict[str, int | None] = dict.fromkeys(order_of_uids)
        foreign = []
        for place, prediction in stream(self.partial)[1]:
            if prediction.uid in places:
                places[prediction.uid] = place
            else:
                foreign.append(prediction.uid)
        twice = []
        if len(places) < len(order_of_uids):
            twice = [uid for uid, count in Counter(order_of_uids).items() if count > 1]
        missing = [uid for uid, place in places.items() if place is None]
        for uids, problem in (
            (twice, "stand twice in the split"),
            (missing, "have no prediction; run predict again to continue"),
            (foreign, "belong to no row of the split; the data changed, begin anew"),
        ):
            if uids:
                raise PredictionsError(
                    f"{self.partial}: {len(uids)} uids {problem} (the first: {uids[0]!r})"
                )
        there = (place for place in places.values() if place is not None)
        write(self.path, self.header, rows_at(self.partial, there))
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
