"""The text half of the program stands without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import llm_emo

# Every module above the line of ARCHITECTURE.md. What is not in this list or the next one has
# been forgotten, and fails below.
TEXT_LAND = (
    "llm_emo",
    "llm_emo.errors",
    "llm_emo.types",
    "llm_emo.labels",
    "llm_emo.validation",
    "llm_emo.resources",
    "llm_emo.fetch",
    "llm_emo.datasets",
    "llm_emo.protocols",
    "llm_emo.prompts",
    "llm_emo.recipe_errors",
    "llm_emo.recipes",
    "llm_emo.parsing",
    "llm_emo.metrics",
    "llm_emo.predictions",
)
HEAVY = ("torch", "transformers", "peft", "accelerate", "evaluate", "bitsandbytes")


@pytest.mark.parametrize("module", TEXT_LAND)
def test_a_text_module_loads_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(llm_emo.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
