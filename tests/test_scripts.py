"""Every measuring script explains itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*/*.py"))


def test_there_are_scripts():
    assert {path.parent.name for path in SCRIPTS} == {"bench", "gpu"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_help_has_an_example_and_imports_no_torch(path):
    # Whoever imports torch for its help text gets a module that cannot be used, and fails.
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"sys.argv = [{str(path)!r}, '--help']; sys.path[0] = {str(path.parent)!r}; "
        f"runpy.run_path({str(path)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "example" in done.stdout
    assert f"scripts/{path.parent.name}/{path.name}" in done.stdout
