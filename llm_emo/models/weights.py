"""Weights on disk: read from files that others made, written as safetensors piece by piece.

Reading runs no code: a `.bin` file is unpickled with `weights_only`, and must hold tensors alone.
Both formats are mapped into memory, so that a tensor is read when it is used and never held
twice. Writing takes one tensor at a time for the same reason: `safetensors.torch.save_file`
wants a whole file's tensors at once.
"""

import contextlib
import hashlib
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llm_emo.errors import ModelError
from llm_emo.models.source import AGAIN, read_json

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Names of tensors with their dtypes and shapes."""

_FORMATS = (
    ("model.safetensors.index.json", "model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)
"""Index, single file and shards of a checkpoint; safetensors first."""

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip
_LFS = b"version https://git-lfs"
_CHUNK = 1 << 22


def files_of(folder: Path) -> tuple[list[Path], Path | None]:
    """Return the weight files of a checkpoint folder in their order, and its index.

    Raises:
        ModelError: there are none, or an index names files that are absent.
    """
    incomplete: ModelError | None = None
    for index_name, single, pattern in _FORMATS:
        index = folder / index_name
        if index.is_file():
            try:
                return _indexed(index), index
            except ModelError as error:  # perhaps it was fetched without its weights
                incomplete = incomplete or error
        elif (folder / single).is_file():
            return [folder / single], None
        elif shards := sorted(folder.glob(pattern)):
            return shards, None
    if incomplete is not None:
        raise incomplete
    raise ModelError(
        f"{folder}: holds no weights; expected pytorch_model.bin or model.safetensors, or shards "
        "such as pytorch_model-00001-of-00007.bin with their index"
    )


def total_size(index: Path) -> int | None:
    """Return the bytes of all tensors as an index states them, if it does."""
    metadata = read_json(index).get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return size if isinstance(size, int) else None


def names_in(index: Path) -> dict[str, str]:
    """Return the tensors that an index names, and the file of each.

    Raises:
        ModelError: the file is no index, or leads out of its folder.
    """
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ModelError(f"{index}: has no weight_map of tensors to files; {AGAIN}")
    if outside := [name for name in where.values() if Path(name).name != name]:
        raise ModelError(f"{index}: names {outside[0]!r}, which is no file of its own folder")
    return where


def file_holding(folder: Path, prefix: str) -> Path | None:
    """Return the file in which the tensors lie whose names begin with `prefix`, if there is one.

    This only asks where they are: a file that cannot be read holds none, and whoever reads it
    says what is wrong with it.

    Raises:
        ModelError: an index is damaged, or parts these tensors.
    """
    for index_name, single, _ in _FORMATS:
        index, path = folder / index_name, folder / single
        if index.is_file():
            names = names_in(index)
            files = {file for name, file in names.items() if name.startswith(prefix)}
            if len(files) > 1:
                raise ModelError(f"{index}: {prefix}* lies in {len(files)} files; expected one")
            if files:
                return folder / files.pop()
        elif path.is_file():
            with contextlib.suppress(ModelError):
                if any(name.startswith(prefix) for name in read(path)):
                    return path
    return None


def _indexed(index: Path) -> list[Path]:
    names = sorted(set(names_in(index).values()))
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise ModelError(
            f"{index}: names {len(names)} files, of which {len(absent)} "
            f"{'is' if len(absent) == 1 else 'are'} absent: {', '.join(absent)}; download what "
            "is missing into the folder"
        )
    return [index.parent / name for name in names]


def size_of(specs: Specs) -> int:
    """Return the bytes of tensors, without the header of a file."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())


# --- reading --------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped: they are read when they are used.

    Raises:
        ModelError: the file is truncated, a git-lfs pointer, of a format that would run code on
            loading, or holds something other than tensors.
    """
    _refuse_pointer(path)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        return _unpickled(path)
    except (OSError, RuntimeError, SafetensorError, EOFError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path}: is truncated or damaged ({path.stat().st_size:,} bytes; {_short(error)}); "
            f"{AGAIN}"
        ) from error


def _unpickled(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"PK\x03\x04":
        raise ModelError(
            f"{path}: is no file that torch.save has written since version 1.6; {AGAIN}, or "
            "store it again as safetensors"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: refused: it holds Python objects other than tensors, which run code when "
            "they are loaded; a checkpoint's weights are tensors alone"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds a {type(content).__name__}, expected named tensors")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ModelError(
                f"{path}: {name!r} is a {type(value).__name__}; expected tensors alone, so name "
                "a file of weights, not of training state"
            )
        if value.layout is not torch.strided or value.is_meta:
            raise ModelError(f"{path}: {name} is no dense tensor")
    return dict(content)


def verify(path: Path, progress: Callable[[int], None]) -> dict[str, Any]:
    """Return size and sha256 of a file, after holding it against its own checksums.

    A `.bin` file is a zip archive with a checksum for every tensor. A download that was cut off
    may have its full length and its directory, and zeros between. torch writes zeros for all
    checksums where it was told to leave them out; of such a file only the structure is held.

    Args:
        path: the file.
        progress: called with the bytes that were read.

    Raises:
        ModelError: a checksum differs.
    """
    if path.suffix == ".bin":
        try:
            with zipfile.ZipFile(path) as archive:
                summed = any(record.CRC for record in archive.infolist())
                damaged = archive.testzip() if summed else None
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            raise ModelError(f"{path}: is truncated or damaged ({error}); {AGAIN}") from error
        if damaged is not None:
            raise ModelError(
                f"{path}: is damaged: the checksum of its record {damaged} differs; {AGAIN}"
            )
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
            progress(len(block))
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as stream:
        start = stream.read(len(_LFS))
    if start == _LFS:
        raise ModelError(
            f"{path}: is a git-lfs pointer of {path.stat().st_size} bytes, not the weights; run "
            "`git lfs install && git lfs pull` in its repository, or download the file itself"
        )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


# --- writing --------------------------------------------------------------------------------------


def write(
    path: Path, specs: Specs, tensors: Iterable[Tensor], progress: Callable[[int], None]
) -> dict[str, Any]:
    """Write a safetensors file tensor by tensor; return its size and sha256.

    Args:
        path: the file; overwritten.
        specs: of the tensors, in their order; they stand in front of the file.
        tensors: the same number, taken one at a time.
        progress: called with the bytes of tensors that were written.

    Raises:
        ValueError: a tensor is not what its spec says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in specs.items():
        size = dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]
        }  # fmt: skip
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    digest = hashlib.sha256()
    with path.open("wb") as stream:

        def put(block: bytes | memoryview) -> None:
            stream.write(block)
            digest.update(block)

        put(len(text).to_bytes(8, "little") + text)
        for (name, spec), tensor in zip(specs.items(), tensors, strict=True):
            if (tensor.dtype, tuple(tensor.shape)) != spec:
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, expected {spec}")
            # bfloat16 has no counterpart in NumPy; bytes do. Rows of a mapped file stay mapped.
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, flat.size, _CHUNK):
                put(flat[start : start + _CHUNK].data)
                progress(min(_CHUNK, flat.size - start))
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
