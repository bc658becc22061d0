"""The machine that a job runs on: its processes, its terminal, its disk."""

import contextlib
import errno
import sys
from collections.abc import Iterator
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
    return PartialState(cpu=not torch.cuda.is_available())


def say(text: str) -> None:
    """Write a line of progress, once per job."""
    if processes().is_main_process:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def peak_memory() -> int | None:
    """Return the most memory that this process has held, in bytes.

    Of the GPU where there is one, else of the process, all that was loaded before included; None
    where the system does not tell.
    """
    if torch.cuda.is_available() and (held := torch.cuda.max_memory_allocated()):
        return held
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
