"""What a layer does beside its large products, compiled: few passes over memory each, on a CPU.

Next to products that fill a core's caches, every other operation of torch begins cold: its code and
its numbers have to be fetched again, which takes longer than what it does. A norm is eight of them,
in float32 that bfloat16 has to be turned into. `native.c` says each of these things as one loop,
`native_attention.c` all of a layer's attention, and `native_lora.c` all of LoRA's products of one
input. A C compiler makes a library of them where there is one, once, in the cache folder; where
there is none, torch's operations do the same, to rounding. `LLM_EMO_NATIVE=0` asks for them.

Its threads are those of the pool that torch has begun already, GNU's: a second pool would fight for
the same cores. So there is no library where torch brings another kind.

Letters: N nodes, E hidden size, H heads, D head dimension.
"""

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_emo import fetch
from llm_emo.errors import JobFailed

SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("native.c", "native_lora.c", "native_attention.c")
)
HEADER = Path(__file__).with_name("native.h")
OPTIONS = ("-fPIC", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
"""The last two let compilers make vectors of loops; neither changes a number."""

NUMBERS = {torch.bfloat16: (), torch.float32: ("-DFLOAT32",)}
"""What the sources are compiled for, and the option that says so."""

PROCESSOR = ("model name", "flags", "Features", "CPU implementer", "CPU part", "CPU variant")
"""What /proc/cpuinfo calls that on which machine code depends."""

POINTER, COUNT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "rms_norm": [*[POINTER] * 2, FLOAT, *[COUNT] * 2, *[POINTER] * 2],
    "rms_norm_backward": [*[POINTER] * 5, *[COUNT] * 2, POINTER],
    "gated": [POINTER, *[COUNT] * 2, POINTER],
    "gated_backward": [*[POINTER] * 2, *[COUNT] * 2, POINTER],
    "rotate": [*[POINTER] * 3, FLOAT, *[COUNT] * 4],
    "log_sum_exp": [POINTER, *[COUNT] * 2, POINTER],
    "softmax_times": [*[POINTER] * 3, *[COUNT] * 2, POINTER],
    "has_wide_vectors": [],
    "attend": [*[POINTER] * 3, COUNT, FLOAT, *[POINTER] * 2, COUNT, POINTER],
    "attend_backward": [
        *[POINTER] * 3,
        COUNT,
        FLOAT,
        *[POINTER] * 4,
        COUNT,
        POINTER,
    ],
    "attend_shares": [POINTER],
    "attend_room": [POINTER],
    "attend_backward_room": [POINTER],
    "lora": [POINTER, *[COUNT] * 3, *[POINTER] * 4, FLOAT, *[POINTER] * 3],
    "lora_backward": [*[POINTER] * 3, *[COUNT] * 3, *[POINTER] * 4, FLOAT, *[POINTER] * 4],
}


@cache
def library(dtype: torch.dtype) -> Any:
    """Return the functions compiled for this dtype, or None where they cannot be had."""
    if os.environ.get("LLM_EMO_NATIVE") == "0" or dtype not in NUMBERS:
        return None
    try:
        return _loaded(_compiled((*OPTIONS, *NUMBERS[dtype]), *_tools()))
    except (OSError, AttributeError, JobFailed, subprocess.SubprocessError):
        return None


def _loaded(path: Path) -> Any:
    """Load the library.

    Raises:
        OSError: it is none.
        AttributeError: it lacks a function.
    """
    try:
        made = ctypes.CDLL(str(path))
    except OSError:
        path.unlink()  # damaged: the next process compiles it anew
        raise
    for name, arguments in _ARGUMENTS.items():
        function = getattr(made, name)
        function.argtypes = arguments
        function.restype = COUNT if name.endswith(("_room", "_shares", "_vectors")) else None
    return made


def serves(*tensors: Tensor) -> bool:
    """Whether there is a library, and it can read these."""
    dtype = tensors[0].dtype
    return (
        all(part.dtype == dtype and part.device.type == "cpu" for part in tensors)
        and library(dtype) is not None
    )


def multiplies(dtype: torch.dtype) -> bool:
    """Whether products of loops are worth it: attention's, and LoRA's.

    They keep sums in sixteen vectors of 512 bits. In float32, narrower ones took several times as
    long as torch's products; in bfloat16, torch has none that are fast there either.
    """
    made = library(dtype)
    return made is not None and (dtype == torch.bfloat16 or bool(made.has_wide_vectors()))


def _tools() -> tuple[str, str, str]:
    """Return the compiler, torch's OpenMP, and what the processor can.

    Raises:
        OSError: one of them is not there.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    pools = list(Path(torch.__file__).parent.glob("lib/libgomp*"))
    if len(pools) != 1:
        raise FileNotFoundError("torch brings no OpenMP of GNU's")
    # A cache folder may be shared by machines of several kinds.
    described = Path("/proc/cpuinfo").read_text("utf-8", "replace").partition("\n\n")[0]
    steady = [line for line in described.splitlines() if line.startswith(PROCESSOR)]
    return compiler, str(pools[0]), "\n".join(steady)


def _compiled(options: Sequence[str], compiler: str, openmp: str, processor: str) -> Path:
    """Return the library's path, compiled if it is not in the cache.

    Raises:
        OSError, SubprocessError: the compiler or the disk failed, or others can write the folder.
        JobFailed: there is no cache folder.
    """
    folder = fetch.cache_dir() / f"native-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} can be written by others, and what lies in it is run")
    sources = [source.read_text("utf-8") for source in (HEADER, *SOURCES)]
    key = (*sources, *options, compiler, openmp, processor)
    path = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            unlinked = [str(Path(made) / f"{source.stem}.o") for source in SOURCES]
            linked = Path(made) / path.name
            # In two steps: with `-fopenmp` the linker would add the compiler's own OpenMP.
            for command in (
                *(
                    [compiler, *options, "-c", str(source), "-o", to]
                    for source, to in zip(SOURCES, unlinked, strict=True)
                ),
                [compiler, "-shared", *unlinked, openmp, "-lm", "-o", str(linked)],
            ):
                subprocess.run(command, check=True, capture_output=True, timeout=60)
            linked.replace(path)  # at once: another process may look for it
    return path


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return w x / rms(x) of x (..., E), and 1 / rms(x), shape (..., 1) in float32."""
    x, weight = x.contiguous(), weight.contiguous()
    y, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    width = x.shape[-1]
    library(x.dtype).rms_norm(
        x.data_ptr(), weight.data_ptr(), epsilon, x.numel() // width, width,
        y.data_ptr(), scale.data_ptr(),
    )  # fmt: skip
    return y, scale


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, added: Tensor | None
) -> Tensor:
    """Return the gradient of x, and `added`, of the same shape, to it."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    added = None if added is None else added.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    library(x.dtype).rms_norm_backward(
        grad.data_ptr(), x.data_ptr(), weight.data_ptr(), scale.data_ptr(),
        None if added is None else added.data_ptr(), x.numel() // width, width, out.data_ptr(),
    )  # fmt: skip
    return out


def gated(opening: Tensor) -> Tensor:
    """Return silu(gate) up of `opening`, shape (N, 2F): gate, then up."""
    opening = opening.contiguous()
    rows, width = len(opening), opening.shape[1] // 2
    out = opening.new_empty(rows, width)
    library(opening.dtype).gated(opening.data_ptr(), rows, width, out.data_ptr())
    return out


def gated_backward(grad: Tensor, opening: Tensor) -> Tensor:
    """Return the gradient of `opening`, from that of what `gated` returned."""
    grad, opening = grad.contiguous(), opening.contiguous()
    out = torch.empty_like(opening)
    library(opening.dtype).gated_backward(
        grad.data_ptr(), opening.data_ptr(), *grad.shape, out.data_ptr()
    )
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """Turn heads, x (N, H*D), each row contiguous, by cos and sin (N, 1, D), in place."""
    cos, sin = cos.contiguous(), sin.contiguous()
    size = cos.shape[-1]
    library(x.dtype).rotate(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), sign,
        len(x), x.stride(0), x.shape[1] // size, size,
    )  # fmt: skip


def log_sum_exp(x: Tensor) -> Tensor:
    """Return log sum exp of each row of x, shape (N, V) -> (N,), in float32."""
    x = x.contiguous()
    out = x.new_empty(len(x), dtype=torch.float32)
    library(x.dtype).log_sum_exp(x.data_ptr(), *x.shape, out.data_ptr())
    return out


def softmax_times(x: Tensor, total: Tensor, share: Tensor) -> Tensor:
    """Return softmax(x) times each row's share.

    Args:
        x: Shape (N, V).
        total: What `log_sum_exp` returned, shape (N,).
        share: Shape (N,), float32.
    """
    x, share = x.contiguous(), share.contiguous()
    out = torch.empty_like(x)
    library(x.dtype).softmax_times(
        x.data_ptr(), total.data_ptr(), share.data_ptr(), *x.shape, out.data_ptr()
    )
    return out
