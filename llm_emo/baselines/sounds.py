"""The sound files of rows. No torch here."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from llm_emo.errors import DatasetError
from llm_emo.fetch import sha256_of
from llm_emo.types import Row


def path_of(row: Row) -> Path:
    """Return a row's sound file.

    Raises:
        DatasetError: the corpus, as it lies there, has none for it.
    """
    named = row.utterance.audio
    if named is None:
        raise DatasetError(
            f"{row.utterance.uid}: this copy of the corpus has no sound for it; get the release "
            "with its wav files (`llm-emo datasets` says where)"
        )
    return _there(Path(named))


def _there(path: Path) -> Path:
    if not path.is_file():
        raise DatasetError(f"{path}: no such sound file; is the corpus complete?")
    return path


def paths_of(rows: Sequence[Row]) -> dict[str, Path]:
    """Return the sound file of every uid.

    Raises:
        DatasetError: as `path_of`.
    """
    return {row.utterance.uid: path_of(row) for row in rows}


def digest(paths: Iterable[Path]) -> str:
    """Return one SHA-256 over the contents of sound files, in their order.

    Raises:
        DatasetError: a file is absent.
    """
    whole = hashlib.sha256()
    for path in paths:
        whole.update(sha256_of(_there(path)).encode())
    return whole.hexdigest()
