"""Fixtures that several test files use."""

import os
import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
"""A data root: every corpus in its native format, with sentences written for the project."""


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real corpora; tests that need it are skipped without it."""
    named = os.environ.get("LLM_EMO_SHARED_DATA")
    folder = Path(named) if named else HERE.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no corpora in {folder}; name their folder in LLM_EMO_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model with its tokenizer."""
    import program

    return program.save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run on the Mastodon fixture; to be read, never written."""
    import program

    return program.train(tmp_path_factory.mktemp("runs") / "lora", tiny_folder)


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to tamper with."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
