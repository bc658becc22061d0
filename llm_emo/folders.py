"""A folder that appears under its name when it is complete, or not at all."""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from llm_emo import runs
from llm_emo.errors import EmoError, JobFailed, RunError


@contextlib.contextmanager
def appearing(output: Path, need: int = 0, because: str = "") -> Iterator[Path]:
    """Yield a hidden folder beside `output` that becomes it at the end, or goes away.

    Args:
        output: absent or empty; a link stands for the folder that it names.
        need: the bytes that will be written; so much must be free.
        because: why it is more than one would think, where it is.

    Raises:
        RunError: another process is at it, or no folder can appear under this name.
        JobFailed: there is no room, or the disk cannot be written.
    """
    if output.is_symlink():  # a folder renamed to it would have to replace it
        output = output.resolve()
    if output.is_mount():  # known now, not when everything is written
        raise RunError(f"{output}: is where a disk is mounted; name a new folder in it")
    hidden = output.with_name(f".{output.name}.partial")
    with _disk(output):
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise RunError(f"{output}: {output.parent} is no folder; choose another -o") from None
        lock = FileLock(output.with_name(f".{output.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{output}: another process is writing it; wait for that one") from None
        try:
            runs.require_free(output)  # that process may have been done just now
            if hidden.exists():
                print(f"removing what a stopped run left: {hidden}", file=sys.stderr)  # noqa: T201
                shutil.rmtree(hidden)
            free = shutil.disk_usage(output.parent).free
            if free < need:
                why = f" ({because})" if because else ""
                raise JobFailed(
                    f"{output}: needs {need / 2**30:.2f} GiB{why}, but its disk has "
                    f"{free / 2**30:.2f} GiB free; make room, or name a folder on another disk"
                )
            hidden.mkdir()
            yield hidden
            # A machine that goes down must not leave the name with files that are not there.
            for path in (*hidden.rglob("*"), hidden):
                _sync(path)
            if output.exists():
                output.rmdir()
            hidden.rename(output)
            _sync(output.parent)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    if os.name == "nt":  # opens no folders, and syncs only what was opened for writing
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network disks sync no folders
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _disk(output: Path) -> Iterator[None]:
    """Turn a disk that is full or cannot be written into one message."""
    then = "nothing is left there; make room, or name another folder"
    try:
        yield
    except EmoError:
        raise
    except OSError as error:
        from llm_emo.machine import DISK  # it loads torch, this module does not

        if error.errno not in DISK:
            raise
        # A copy that finds no room names the file that it reads; only rights are that file's own.
        own = error.errno in (errno.EACCES, errno.EPERM, errno.EIO)
        place = (error.filename if own else None) or output
        raise JobFailed(f"{place}: {error.strerror}; {then}") from error
    except Exception as error:
        if "(os error" not in str(error):  # what Rust's libraries raise has no class of its own
            raise
        raise JobFailed(f"{output}: cannot be written: {error}; {then}") from error
