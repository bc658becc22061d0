"""Fixtures that several test files use."""

import os
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
