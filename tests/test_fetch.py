"""Fetching through pip: hashes, the cache, two processes at once, and no network."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from llm_emo import datasets, fetch
from llm_emo.datasets import vader
from llm_emo.errors import DatasetError, JobFailed

CONTENT = b"a wheel in name only"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
REQUIREMENT = "Some_Package==1.0"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "cache"))
    return fetch.cache_dir()


class Pip:
    """Stands in for pip: writes a file into --dest, or fails with a message."""

    def __init__(self, content=CONTENT, error=None):
        self.content, self.error, self.commands = content, error, []

    def __call__(self, command, **options):
        self.commands.append(command)
        if self.error is not None:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        target = Path(command[command.index("--dest") + 1])
        target.mkdir()
        (target / "some_package-1.0-py3-none-any.whl").write_bytes(self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch) -> Pip:
    fake = Pip()
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def get(**options):
    return fetch.pip_download(REQUIREMENT, SHA256, **{"source": False, **options})


def test_cache_folder_is_the_named_one(cache, tmp_path):
    assert cache == tmp_path / "cache"
    assert cache.is_dir()


def test_cache_folder_is_the_users_without_a_name(monkeypatch, tmp_path):
    monkeypatch.delenv("LLM_EMO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.cache_dir().is_relative_to(tmp_path)


def test_cache_folder_that_cannot_be_made_says_how_to_name_another(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(JobFailed, match="LLM_EMO_CACHE"):
        fetch.cache_dir()


def test_pip_is_asked_for_one_file_of_one_hash(cache, pip, monkeypatch):
    assert get().read_bytes() == CONTENT
    command = pip.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(command)
    assert "--no-build-isolation" not in command


def test_source_is_asked_for_only_of_the_package_itself(cache, pip):
    get(source=True)
    command = pip.commands[0]
    assert command[command.index("--no-binary") + 1] == "Some_Package"


def test_second_call_takes_the_cache(cache, pip):
    assert get() == get()
    assert len(pip.commands) == 1


def test_file_placed_by_hand_is_accepted_when_its_hash_fits(cache, pip):
    (cache / "downloads").mkdir()
    placed = cache / "downloads" / "some-package-1.0.tar.gz"
    placed.write_bytes(CONTENT)
    assert get() == placed
    assert pip.commands == []


def test_file_placed_by_hand_with_another_hash_is_not_used(cache, pip):
    (cache / "downloads").mkdir()
    (cache / "downloads" / "some_package-1.0-py3-none-any.whl").write_bytes(b"forged")
    assert get().read_bytes() == CONTENT
    assert len(pip.commands) == 1


def test_file_of_another_hash_is_refused_even_if_pip_gives_it(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", Pip(content=b"forged"))
    with pytest.raises(JobFailed):
        get()
    assert fetch.placed(REQUIREMENT, SHA256) is None


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("ERROR: Could not find a version\nERROR: No matching distribution", "No matching"),
        ("/usr/bin/python3: No module named pip", "ensurepip"),
        ("WARNING: Retrying after NewConnectionError\nERROR: No matching", "is there a network"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE FILE", "another hash"),
    ],
)
def test_failure_says_why_and_how_to_place_the_file(cache, monkeypatch, output, reason):
    monkeypatch.setattr(subprocess, "run", Pip(error=output))
    with pytest.raises(JobFailed) as caught:
        get()
    message = str(caught.value)
    assert reason in message
    assert "https://pypi.org/project/Some_Package/1.0/#files" in message
    assert str(cache / "downloads") in message
    assert SHA256 in message
    assert caught.value.exit_code == 1
    assert list((cache / "downloads").glob("fetching-*")) == []


def test_no_network_is_one_message(cache, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(JobFailed, match=r"is there a network\?") as caught:
        get()
    assert "\n" not in str(caught.value)


def test_two_at_once_fetch_once(cache, monkeypatch):
    fake = Pip()
    monkeypatch.setattr(subprocess, "run", fake)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(get())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake.commands) == 1
    assert len(set(found)) == 1
    assert len(found) == 4


def archive(members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def sdist(cache, fixtures, monkeypatch) -> Path:
    """An sdist of VADER's form around the fixture's files, lying in the cache."""
    texts = {
        f"hutto_ICWSM_2014/{name}": (fixtures / "vader" / name).read_bytes()
        for name in vader.TEXTS + vader.RATINGS
    }
    texts |= {"../escaped.txt": b"x", "hutto_ICWSM_2014/setup.py": b"raise SystemExit"}
    raw = archive({f"vaderSentiment-3.3.2/{vader.ARCHIVE}": archive(texts)})
    monkeypatch.setattr(fetch, "VADER_SHA256", hashlib.sha256(raw).hexdigest())
    (cache / "downloads").mkdir()
    path = cache / "downloads" / "vaderSentiment-3.3.2.tar.gz"
    path.write_bytes(raw)
    return path


def test_vader_unpacks_the_eight_files_and_nothing_else(sdist, cache, tmp_path, fixtures):
    folder = vader.obtain()
    assert {path.name for path in folder.iterdir()} == {
        *vader.TEXTS,
        *vader.RATINGS,
        vader.MANIFEST,
    }
    assert not list(tmp_path.rglob("escaped.txt"))
    assert (folder / vader.TEXTS[0]).read_bytes() == (
        fixtures / "vader" / vader.TEXTS[0]
    ).read_bytes()


def test_vader_is_loaded_without_a_root_and_from_the_cache_again(sdist):
    rows = datasets.load("vader", None)["all"].num_rows
    sdist.unlink()
    assert datasets.load("vader", None)["all"].num_rows == rows == 31
    assert len(datasets.file_hashes("vader", None)) == 8


def test_vader_cache_that_was_changed_is_made_again(sdist):
    folder = vader.obtain()
    before = (folder / vader.TEXTS[0]).read_bytes()
    (folder / vader.TEXTS[0]).write_bytes(b"1\t4.0\tall is well\r\n")
    assert vader.cached() is None
    vader.obtain()
    assert (folder / vader.TEXTS[0]).read_bytes() == before


def test_vader_manifest_holds_the_hashes(sdist):
    folder = vader.obtain()
    manifest = json.loads((folder / vader.MANIFEST).read_text())
    assert manifest == {
        name: fetch.sha256_of(folder / name) for name in vader.TEXTS + vader.RATINGS
    }


def test_vader_sdist_without_the_archive_is_named(tmp_path):
    (tmp_path / "vader.tar.gz").write_bytes(archive({"vaderSentiment-3.3.2/setup.py": b""}))
    with pytest.raises(DatasetError, match="hutto_ICWSM_2014"):
        vader.unpack(tmp_path / "vader.tar.gz", tmp_path)


def test_vader_sdist_that_is_cut_short_is_named(sdist, tmp_path):
    raw = sdist.read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DatasetError, match="no complete archive"):
        vader.unpack(tmp_path / "cut.tar.gz", tmp_path)
