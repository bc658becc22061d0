"""The benchmark scripts as modules."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[1] / "scripts" / "bench"


def common(name: str) -> ModuleType:
    """Return one of the modules that the benchmarks share."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(f"common.{name}")


def load(name: str) -> ModuleType:
    """Return a benchmark without running it."""
    common("harness")
    spec = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
