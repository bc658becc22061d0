"""Encoded rows kept as Arrow in the cache folder, where encoding them takes seconds.

A file is named after a hash of everything that decides its ids. It is a stream of Arrow and a
SHA-256 of that; it appears when it is complete, and one that is damaged all the same is made again.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
from filelock import FileLock

from llm_emo import fetch
from llm_emo.encoding import Encoded, Encoder
from llm_emo.errors import JobFailed
from llm_emo.types import Example

LEAST = 3_000_000
"""Bytes of messages from which on rows are kept: below, reading them back would save no second.

Of the shipped recipes, those that show whole dialogues have more.
"""

CODE = ("encoded_rows.py", "encoding.py", "types.py")
"""What turns an example into ids, and ids into a file."""

DIGEST = hashlib.sha256().digest_size
"""Bytes at a file's end: the SHA-256 of all that stands before them."""

FILES = 16
"""Files that are kept; then the one that was not used for longest goes."""


def encoded(encoder: Encoder, examples: Sequence[Example]) -> list[Encoded]:
    """Return what `encoder.encode` returns, read from the cache folder where that is faster.

    Two processes that start at once encode once. Without a cache folder nothing is kept.

    Raises:
        PromptError: instruction, labels and answer alone exceed the encoder's `max_length`.
    """
    if sum(len(example.message.encode("utf-8", "replace")) for example in examples) < LEAST:
        return encoder.encode(examples)
    try:
        folder = fetch.cache_dir() / "encoded"
    except JobFailed:
        return encoder.encode(examples)
    path = folder / f"{_key(encoder, examples)}.arrow"
    rows: list[Encoded] | None = None
    try:
        path.parent.mkdir(exist_ok=True)
        with FileLock(f"{path}.lock"):
            rows = _read(path, examples)
            if rows is None:
                rows = encoder.encode(examples)
                _write(path, rows)
            _forget(path.parent)
    except OSError as error:  # nothing is lost but the seconds that encoding takes
        from llm_emo.machine import say  # it loads torch, this module does not

        say(f"{path}: encoded rows are not kept: {error.strerror}")
    return encoder.encode(examples) if rows is None else rows


def _key(encoder: Encoder, examples: Iterable[Example]) -> str:
    texts = hashlib.sha256()
    for example in examples:
        # Frozen text fields; repr keeps apart what joining would not.
        texts.update(repr(example).encode("utf-8", "surrogatepass"))
    tokenizer = encoder.tokenizer
    parts = {
        **encoder.fingerprint(),
        "chat_template": str(tokenizer.chat_template),
        "split_special_tokens": str(tokenizer.split_special_tokens),
        "max_length": str(encoder.max_length),
        "end": str(encoder.end),
        "examples": texts.hexdigest(),
        **{name: metadata.version(name) for name in ("tokenizers", "transformers")},
        # Whoever changes how rows are encoded need not remember this file.
        **{name: fetch.sha256_of(Path(__file__).with_name(name)) for name in CODE},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _write(path: Path, rows: Sequence[Encoded]) -> None:
    table = pa.table(
        {
            "prompt": pa.array([row.prompt for row in rows], pa.list_(pa.int32())),
            "answer": pa.array([row.answer for row in rows], pa.list_(pa.int32())),
            "dropped": pa.array([row.dropped for row in rows], pa.int64()),
        }
    )
    body = pa.BufferOutputStream()
    with pa.ipc.new_stream(body, table.schema) as writer:
        writer.write_table(table)
    content = body.getvalue().to_pybytes()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as sink:
            sink.write(content + hashlib.sha256(content).digest())  # readers of streams stop before
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, examples: Sequence[Example]) -> list[Encoded] | None:
    """Return the file's rows, or None where it is absent or damaged."""
    if not path.is_file():
        return None
    # Read rather than mapped: a file that shrinks under a map ends the process.
    content = path.read_bytes()
    body = content[:-DIGEST]
    if hashlib.sha256(body).digest() != content[-DIGEST:]:
        return None
    table = pa.ipc.open_stream(body).read_all()
    with contextlib.suppress(OSError):  # somebody else's file can be read all the same
        os.utime(path)  # used just now
    return [
        Encoded(example.uid, prompt, answer, dropped)
        for example, prompt, answer, dropped in zip(
            examples,
            _tuples(table.column("prompt")),
            _tuples(table.column("answer")),
            table.column("dropped").to_pylist(),
            strict=True,
        )
    ]


def _tuples(column: pa.ChunkedArray) -> list[tuple[int, ...]]:
    """Return the lists of a column; far faster than asking each list for its values."""
    lists = column.combine_chunks()
    ids, at = lists.values.to_numpy().tolist(), lists.offsets.to_numpy().tolist()
    return [tuple(ids[start:end]) for start, end in itertools.pairwise(at)]


def _forget(folder: Path) -> None:
    """Remove the files beyond the newest, and what marks that they were being written."""
    used: dict[Path, float] = {}
    for path in folder.glob("*.arrow"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            used[path] = path.stat().st_mtime
    for path in sorted(used, key=lambda path: used[path], reverse=True)[FILES:]:
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
