"""A finished run inside the run that is built on it.

So neither moving nor retraining the one below changes the one above.
"""

import contextlib
import importlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from llm_emo import runs
from llm_emo.baselines import kinds
from llm_emo.baselines.classifier import Classifier
from llm_emo.errors import ModelError
from llm_emo.machine import writing

if TYPE_CHECKING:
    from llm_emo.experiment import BaselineExperiment

METHOD = runs.NESTED_METHOD
"""The section `method` of the recipe that the run was trained by."""


@dataclass(frozen=True)
class Nested:
    """A finished run below another one.

    `source` is the folder with what it has learned, `method` that section of its recipe, and
    `learned` is `runs.folder_sum` of the source when the classifier was read from it.
    """

    source: Path
    method: kinds.Kind
    classifier: Classifier
    learned: str


def keep(run: Nested, folder: Path) -> None:
    """Put what a finished run has learned into `folder`, which is made; linked where that works.

    A source that has gone since, or holds something else, is written anew from what was read of it.

    Args:
        run: where it lies in `folder` itself, there is nothing to do.
        folder: where it goes; what lies there is removed.

    Raises:
        JobFailed: the disk is full or cannot be written.
    """
    there = run.source.is_dir()
    if there and folder.exists() and folder.samefile(run.source):
        return
    there = there and _sum(run.source) == run.learned
    with writing(folder, "make room, or name another folder"):
        if folder.exists():
            shutil.rmtree(folder)
        if there:
            shutil.copytree(run.source, folder, copy_function=_linked)
        else:
            folder.mkdir(parents=True)
            run.classifier.save(folder)
        # Replaced, not written: where the source has one, it is the same file under two names.
        partial = folder / f".{METHOD}.tmp"
        partial.write_text(run.method.model_dump_json(indent=2) + "\n", "utf-8")
        partial.replace(folder / METHOD)


def _sum(folder: Path) -> str:
    return runs.folder_sum(folder, besides=METHOD)


def _linked(source: str, target: str) -> None:
    # Written files are replaced, never changed, so a second name for one is a copy of it.
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)


def read(folder: Path, experiment: "BaselineExperiment") -> Nested:
    """Return the run that `keep` put into `folder`.

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
    learned = _sum(folder)
    module = importlib.import_module(f"llm_emo.baselines.{MODULES[method.kind]}")
    made = module.load(method, experiment, folder)
    if not isinstance(made, Classifier):
        raise ModelError(f"{folder}: method {method.kind} gives no features to build on")
    return Nested(folder, method, made, learned)
