"""Features of a frozen encoder, computed once and kept as Arrow in the cache folder.

A file is named after a hash of everything that decides its numbers, and holds a SHA-256 of them.
It appears when it is complete; one that is damaged all the same is made again.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from filelock import FileLock
from torch import nn

from llm_emo import fetch
from llm_emo.machine import writing

Floats = np.typing.NDArray[np.float32]
Key = Mapping[str, str | int | None]

VERSION = 1
"""Of the file's form and of what is computed; a change makes every file anew."""


_keeping: ContextVar[bool] = ContextVar("_keeping", default=True)


@contextlib.contextmanager
def unkept() -> Iterator[None]:
    """Have features computed, and neither looked up nor kept, while this is entered.

    What a deployed model reads comes once, and would only fill its user's disk.
    """
    before = _keeping.set(False)
    try:
        yield
    finally:
        _keeping.reset(before)


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # bfloat16 has no counterpart in NumPy; bytes do.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cached(
    key: Callable[[], Key],
    uids: Sequence[str],
    compute: Callable[[], Floats],
    *,
    folder: Path | None = None,
) -> Floats:
    """Return one feature vector a row, shape (N, D), from the cache or computed and kept there.

    Two processes that start at once compute once. Within `unkept`, they are just computed.

    Args:
        key: gives everything that the numbers depend on: weights, tokenizer, texts, length; not
            asked within `unkept`, because hashing weights may take longer than reading a text.
        uids: of the rows, in their order; part of the key.
        compute: gives the features, shape (N, D), float32.
        folder: where files are kept; the program's cache folder by default.

    Returns:
        An array that may read the file as it is used; not to be written.

    Raises:
        JobFailed: the disk is full or cannot be written.
    """
    if not _keeping.get():
        return _computed(uids, compute)
    whole = {"version": VERSION, "key": dict(key()), "uids": list(uids)}
    name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]
    folder = folder or fetch.cache_dir() / "features"
    path = folder / f"{name}.arrow"
    if (found := _read(path, uids)) is not None:
        return found
    with writing(path, "make room, or name another cache folder in LLM_EMO_CACHE"):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if (found := _read(path, uids)) is not None:
                return found
            features = _computed(uids, compute)
            _write(path, uids, features)
    return features


def _computed(uids: Sequence[str], compute: Callable[[], Floats]) -> Floats:
    features = np.ascontiguousarray(compute(), dtype=np.float32)
    if features.ndim != 2 or len(features) != len(uids):
        raise ValueError(f"features of shape {features.shape} for {len(uids)} rows")
    return features


def _write(path: Path, uids: Sequence[str], features: Floats) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    table = pa.table({"uid": pa.array(uids, pa.string()), "features": column})
    digest = hashlib.sha256(features.data).hexdigest()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        schema = table.schema.with_metadata({"sha256": digest})
        with temporary.open("wb") as sink:
            with pa.ipc.new_file(sink, schema) as writer:
                writer.write_table(table.replace_schema_metadata({"sha256": digest}))
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, uids: Sequence[str]) -> Floats | None:
    """Return the file's features, or None where it is absent or damaged."""
    if not path.is_file():
        return None
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        column = table.column("features").combine_chunks()
        width = column.type.list_size
        features: Floats = column.flatten().to_numpy(zero_copy_only=True).reshape(-1, width)
        whole = hashlib.sha256(features.data).hexdigest().encode()
        intact = table.schema.metadata[b"sha256"] == whole
        same_rows = table.column("uid").to_pylist() == list(uids)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        return None  # damaged, in whatever way: it is made again
    return features if intact and same_rows else None
