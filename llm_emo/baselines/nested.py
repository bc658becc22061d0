"""A finished run inside the run that is built on it.

So neither moving nor retraining the one below changes the one above.
"""

import contextlib
import importlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from llm_emo.baselines import kinds
from llm_emo.baselines.classifier import Classifier
from llm_emo.errors import ModelError
from llm_emo.machine import writing

if TYPE_CHECKING:
    from llm_emo.experiment import BaselineExperiment

METHOD = "method.json"
"""The section `method` of the recipe that the run was trained by."""


def keep(source: Path, method: kinds.Kind, folder: Path) -> None:
    """Put what a finished run has learned into `folder`, which is made; linked where that works.

    Args:
        source: the run's adapter folder.
        method: the section `method` of its recipe.
        folder: where it goes; what lies there is removed.

    Raises:
        JobFailed: the disk is full or cannot be written.
    """
    with writing(folder, "make room, or name another folder"):
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(source, folder, copy_function=_linked)
        # Replaced, not written: where `source` has one, it is the same file under two names.
        partial = folder / f".{METHOD}.tmp"
        partial.write_text(method.model_dump_json(indent=2) + "\n", "utf-8")
        partial.replace(folder / METHOD)


def _linked(source: str, target: str) -> None:
    # Written files are replaced, never changed, so a second name for one is a copy of it.
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)


def read(folder: Path, experiment: "BaselineExperiment") -> Classifier:
    """Return the classifier that `keep` put into `folder`.

    Args:
        folder: of one run below.
        experiment: of the run above; both have the same protocol and seed.

    Raises:
        ModelError: a file is absent or damaged.
    """
    from llm_emo.baselines.opening import MODULES  # it may be what imports this

    path = folder / METHOD
    adapter: TypeAdapter[kinds.Kind] = TypeAdapter(kinds.Kind)
    try:
        method = adapter.validate_json(path.read_text("utf-8"))
    except (OSError, ValueError, ValidationError) as error:
        raise ModelError(
            f"{path}: cannot be read ({type(error).__name__}); the run is damaged"
        ) from error
    module = importlib.import_module(f"llm_emo.baselines.{MODULES[method.kind]}")
    made = module.load(method, experiment, folder)
    if not isinstance(made, Classifier):
        raise ModelError(f"{folder}: method {method.kind} gives no features to build on")
    return made
