"""The run folder: everything that a number depends on, beside the number.

recipe.yaml          the recipe's text as it was read, and overrides.json
prompt.yaml          the prompt file's text; a specialised model has none
labels.json          label names, words, answers, aliases
environment.json     versions, revisions, hashes of the corpus files, splits, hardware, hashes of
                     what the runs below had learned
log.jsonl            one object a step or evaluation
adapter/             what was learned, as stock PEFT reads it, and its fingerprint; of a
                     specialised model all that it is
checkpoints/         to resume from
<split>.predictions.jsonl, <split>.report.json
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from llm_emo import __version__, recipes
from llm_emo.errors import JobFailed, RunError
from llm_emo.experiment import AnyExperiment, Experiment
from llm_emo.fetch import sha256_of
from llm_emo.recipes import AnyRecipe, BaselineRecipe, Recipe
from llm_emo.types import Split

PACKAGES = (
    "torch", "transformers", "tokenizers", "peft", "accelerate", "bitsandbytes", "datasets",
    "safetensors", "scikit-learn", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run folder; made by `create`, found again by `open_run`."""

    folder: Path

    @property
    def adapter(self) -> Path:
        """Where the trained adapter lies."""
        return self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Where training resumes from."""
        return self.folder / "checkpoints"

    @property
    def log(self) -> Path:
        """The training log, JSON lines."""
        return self.folder / "log.jsonl"

    @property
    def recipe(self) -> AnyRecipe:
        """The recipe with the overrides that it was run with."""
        return recipes.load(str(self.folder / "recipe.yaml"), self.overrides)

    @property
    def overrides(self) -> list[str]:
        """The overrides that the recipe was run with."""
        return [str(override) for override in self._json("overrides.json", list)]

    @property
    def environment(self) -> dict[str, Any]:
        """What `environment.json` holds."""
        content = dict(self._json("environment.json", dict))
        missing = [key for key in ("run", "data_root", "files") if key not in content]
        if missing:
            raise RunError(
                f"{self.folder / 'environment.json'}: lacks {', '.join(missing)}; "
                "the run folder is damaged"
            )
        return content

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order that the run learned them in."""
        content = self._json("labels.json", dict)
        if not isinstance(names := content.get("names"), list):
            raise RunError(f"{self.folder / 'labels.json'}: lacks names; the run folder is damaged")
        return tuple(map(str, names))

    @property
    def id(self) -> str:
        """The run's identity, which predictions carry."""
        return str(self.environment["run"])

    def _json(self, name: str, kind: type) -> Any:
        path = self.folder / name
        try:
            content = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise RunError(f"{path}: is no JSON: {error}; the run folder is damaged") from error
        if not isinstance(content, kind):
            raise RunError(f"{path}: found no JSON {kind.__name__}; the run folder is damaged")
        return content

    @property
    def finished(self) -> bool:
        """Whether training came to its end."""
        return self.adapter.is_dir()

    def require_finished(self) -> None:
        """Refuse a run that is still to be trained.

        Raises:
            RunError: training has not finished.
        """
        if not self.finished:
            raise RunError(
                f"{self.folder}: training has not finished; continue it with "
                f"`llm-emo train {self.folder / 'recipe.yaml'} -o {self.folder} --resume`"
            )


NESTED_METHOD = "method.json"
"""What a run's copy of a run below has beside the files of that run's adapter folder."""


def folder_sum(folder: Path, *, besides: str | None = None) -> str:
    """Return the SHA-256 of every file below a folder, with its name.

    Args:
        folder: What is hashed.
        besides: A file of it, by its relative path, that does not count.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    sums = [
        f"{name} {sha256_of(path)}"
        for name, path in zip(names, files, strict=True)
        if name != besides
    ]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def runs_below(recipe: AnyRecipe) -> dict[str, Path]:
    """Return the runs that a recipe builds on, by the name that `adapter/` keeps each under."""
    if not isinstance(recipe, BaselineRecipe):
        return {}
    return {name: Path(folder) for name, folder in recipe.method.below.items()}


def require_same_below(run: Run, below: Mapping[str, Path]) -> None:
    """Refuse a run that was built on other runs than these, or on these before they changed.

    A run below that is gone, or is being trained, says nothing.

    Args:
        run: The run that builds on others.
        below: Those, as `runs_below` returns them.

    Raises:
        RunError: one of them has learned something else by now.
    """
    recorded = run.environment.get("below")
    for name, folder in below.items():
        if not Run(folder).finished:
            continue
        if recorded is not None:
            had = recorded.get(name)
        elif run.finished:  # begun before this was recorded
            had = folder_sum(run.adapter / name, besides=NESTED_METHOD)
        else:
            continue
        if had != folder_sum(Run(folder).adapter):
            raise RunError(
                f"{run.folder}: was not built on {folder} as it is: that has been trained anew "
                f"since, or the recipe named another run; remove {run.folder} and train it again"
            )


def predictions_path(folder: Path, split: Split) -> Path:
    """Return the name of a split's predictions file in `folder`."""
    return folder / f"{split}.predictions.jsonl"


def default_folder(recipe_path: Path) -> Path:
    """Return `runs/<dataset folder>-<recipe>` under the working directory."""
    return Path("runs") / f"{recipe_path.resolve().parent.name}-{recipe_path.stem}"


def is_run(path: Path) -> bool:
    """Whether `path` is a run folder."""
    return (path / "environment.json").is_file() and (path / "recipe.yaml").is_file()


def open_run(folder: Path) -> Run:
    """Return the run in `folder`.

    Raises:
        RunError: there is none.
    """
    if not is_run(folder):
        raise RunError(f"{folder}: no run folder (it holds recipe.yaml and environment.json)")
    return Run(folder)


def require_free(folder: Path) -> None:
    """Refuse a folder in which something lies.

    Raises:
        RunError: the folder exists and is not empty, is a file, or is the working directory.
    """
    if not folder.name:  # it appears under its name at once, by renaming
        raise RunError(f"{folder}: name a new folder with -o")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; choose another folder with -o")
    if folder.exists() and any(folder.iterdir()):
        what = "holds a run already" if is_run(folder) else "is not empty"
        or_else = ", or continue it with --resume" if is_run(folder) else ""
        raise RunError(f"{folder}: {what}; choose another folder with -o{or_else}")


def create(folder: Path, source: Path, overrides: Sequence[str], experiment: AnyExperiment) -> Run:
    """Make a run folder; it appears complete or not at all.

    Raises:
        RunError: the folder exists and is not empty.
        JobFailed: it cannot be written.
    """
    require_free(folder)
    run_id = f"{source.stem}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "recipe.yaml").write_bytes(source.read_bytes())
        if isinstance(experiment, Experiment):
            (partial / "prompt.yaml").write_text(experiment.prompt.verbatim, "utf-8")
        for name, content in (
            ("overrides.json", list(overrides)),
            ("labels.json", experiment.labels_json()),
            ("environment.json", environment(run_id, experiment)),
        ):
            (partial / name).write_text(_json_text(content), "utf-8")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise JobFailed(f"{folder}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Run(folder)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is complete or absent."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(_json_text(content), "utf-8")
        partial.replace(path)
    except OSError as error:
        raise JobFailed(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _json_text(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def versions() -> dict[str, str]:
    """Return the versions of the packages that a number may depend on."""
    found = {"llm_emo": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        found[name] = metadata.version(name)
    return found


def environment(run_id: str | None, experiment: AnyExperiment) -> dict[str, Any]:
    """Return what `environment.json` holds before a model is loaded."""
    recipe = experiment.recipe
    model = recipe.model.name if isinstance(recipe, Recipe) else recipe.method.kind
    return {
        "run": run_id,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "git_commit": _git_commit(),
        "model": model,
        "revision": recipe.model.revision if isinstance(recipe, Recipe) else None,
        "dataset": recipe.data.dataset,
        "data_root": None if experiment.root is None else str(experiment.root),
        "files": experiment.files,
        "splits": experiment.splits.record,
        "below": {
            name: folder_sum(Run(folder).adapter) for name, folder in runs_below(recipe).items()
        },
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _git_commit() -> str | None:
    """Return the commit of the checkout that the program runs from, `+` if it was changed."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True
        )
        inside = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__], capture_output=True
        )
        if commit.returncode or inside.returncode:
            return None
        changed = subprocess.run(
            ["git", "-C", str(here), "diff", "--quiet", "HEAD"], capture_output=True
        )
    except OSError:
        return None
    return commit.stdout.strip() + ("+" if changed.returncode else "")
