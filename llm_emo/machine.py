"""The machine that a job runs on: its processes, its terminal, its disk."""

import atexit
import contextlib
import ctypes
import errno
import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError

from llm_emo.errors import JobFailed

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""What the operating system says when the disk is full, failing, or not ours to write on."""


def processes() -> PartialState:
    """Return this process's place among those that `accelerate launch` or `torchrun` started.

    Without a GPU they talk through gloo; accelerate would take each for a job of its own unless
    told that there is none.
    """
    _leave_at_exit()
    return PartialState(cpu=not torch.cuda.is_available())


@cache
def _leave_at_exit() -> None:
    """Let the process take leave of the others when it ends.

    Else threads of gloo's may still run while the interpreter is taken down, and abort a process
    whose work is done. NCCL is left alone: after a failure it would wait for the others.
    """
    atexit.register(_leave)


def _leave() -> None:
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_backend() == "gloo":
        group.destroy_process_group()


def say(text: str) -> None:
    """Write a line of progress, once per job."""
    if processes().is_main_process:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def memory() -> int | None:
    """Return this machine's memory in bytes, or the part of it that a container may use.

    None where the system does not say.
    """
    try:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(limit).read_text() if Path(limit).is_file() else ""
        sizes += [int(text)] if text.strip().isdigit() else []
    return min(sizes)


def trim() -> None:
    """Give memory that was freed back to the system, where the system's own library holds it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Keep what exists already out of walks for garbage: one takes a third of a second."""
    if gc.get_freeze_count():  # whoever froze it will not want it thawed here
        yield
        return
    gc.collect()  # or garbage would stay, too
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that this process holds from `begin` on.

    Of the GPU, in tensors, where it holds any. Else resident memory, which begins with what is held
    already: libraries, and models that are still in use.
    """

    begun: bool = False

    @classmethod
    def begin(cls) -> "PeakMemory":
        """Forget what was held before, where the system can."""
        gc.collect()  # a trainer refers to itself, and lives until this
        processes()  # it chooses this process's GPU
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trim()
        try:
            Path("/proc/self/clear_refs").write_text("5", "ascii")  # sets VmHWM to VmRSS
        except OSError:
            return cls()
        return cls(begun=True)

    def read(self) -> int | None:
        """Return the peak so far, in bytes; None where the system cannot begin anew."""
        if torch.cuda.is_available() and (held := torch.cuda.max_memory_allocated()):
            return held
        if not self.begun:
            return None
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


@contextlib.contextmanager
def writing(place: Path, then: str) -> Iterator[None]:
    """Turn a disk that is full or cannot be written into one message about `place`.

    Args:
        place: what is written.
        then: what to do once there is room.

    Raises:
        JobFailed: the disk failed.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise JobFailed(f"{place}: cannot be written: {error.strerror}; {then}") from error
    except SafetensorError as error:  # no OSError, whatever its reason
        if "os error" not in str(error):
            raise
        reason = str(error).rpartition("I/O error: ")[2]
        raise JobFailed(f"{place}: cannot be written: {reason}; {then}") from error
