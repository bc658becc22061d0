"""The text half of the program stands without torch."""

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import llm_emo

ROOT = Path(llm_emo.__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "accelerate", "evaluate", "bitsandbytes")

SCRIPT = f"""
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]
    if loaded:
        sys.exit(f"{{name}} loads {{', '.join(loaded)}}")
"""


def torch_land() -> list[str]:
    """Return the paths that pyproject.toml exempts from the ban on torch at module level."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ignores = settings["tool"]["ruff"]["lint"]["per-file-ignores"]
    patterns: list[str] = []
    for pattern, rules in ignores.items():
        if "TID253" in rules:
            braces = re.search(r"\{(.*)\}", pattern)
            choices = braces.group(1).split(",") if braces else [""]
            patterns += [re.sub(r"\{.*\}", choice, pattern) for choice in choices]
    return patterns


def text_land() -> list[str]:
    """Return every module of the package that is not exempt, shortest name first."""
    exempt = torch_land()
    modules = []
    for path in (ROOT / "llm_emo").rglob("*.py"):
        relative = path.relative_to(ROOT)
        if not any(fnmatch.fnmatch(str(relative), pattern) for pattern in exempt):
            parts = relative.with_suffix("").parts
            modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(modules, key=lambda name: (name.count("."), name))


def test_no_module_above_the_line_loads_torch() -> None:
    modules = text_land()
    assert modules[0] == "llm_emo"
    assert {"llm_emo.parsing", "llm_emo.datasets", "llm_emo.recipes"} < set(modules)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *modules], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_alone_loads_next_to_nothing() -> None:
    script = f"import sys, llm_emo; print(*[n for n in {(*HEAVY, 'numpy')!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.split() == []
