"""Grids: tables of recipes, each trained and measured under one protocol on the same rows.

A grid file names the cells of a table, each a recipe and what of it is changed, and the seeds and
folds that every cell is run with. What is finished already is not run again, so an interrupted
grid goes on where it stopped.

A cell may build on another one's run: in `method.encoder_run=@plain encoder` stands the run of the
cell "plain encoder" with the same seed and fold.
"""

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from llm_emo import opening, predictions, protocols, recipes, resources, runs
from llm_emo.errors import RecipeError, RunError, nearest
from llm_emo.experiment import AnyExperiment, BaselineExperiment
from llm_emo.sections import Many, Section
from llm_emo.types import Prediction, Split
from llm_emo.validation import conflict, problems

CLASS = "f1:"
"""In front of a class's name, the metric is the F1 of that class."""

_RUN = re.compile(r"\s*method\.\w+_run\s*=")
"""An override that says what a cell builds on."""

PARTS = ("accuracy", "macro_f1", "weighted_f1", "unweighted_accuracy", "f1", "parse_rate")


class Cell(Section):
    """One row of the table."""

    recipe: str = Field(min_length=1)
    """A recipe file, or a shipped one: mastodon/lora."""
    set: Many[str] = ()
    """Overrides, KEY=VALUE; a value @CELL stands for the run of another cell."""


class Grid(Section):
    """A table of recipes."""

    title: str = Field(min_length=1)
    """What the table shows."""
    split: Split
    """The split that is measured."""
    metrics: Many[str] = Field(min_length=1)
    """Columns: names of metrics, or f1:CLASS."""
    seeds: Many[int] = Field(min_length=1)
    """Every cell is run with each; the interval is over them."""
    folds: Many[int] | None = None
    """Every cell is run with each, and their predictions are put together. `all` of a file is the
    empty tuple, until `counted` knows how many the corpus has."""
    cells: Annotated[dict[str, Cell], Field(min_length=1)]
    """The rows, by name."""

    @field_validator("folds", mode="before")
    @classmethod
    def _all_is_empty(cls, found: object) -> object:
        if found == []:
            raise conflict("'folds': found an empty list; expected numbers, or all", "folds")
        return [] if found == "all" else found

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for name in self.metrics:
            if not name.startswith(CLASS) and name not in PARTS:
                raise conflict(f"'metrics': no metric {name!r}; {nearest(name, PARTS)}", "metrics")
        for name in ("seeds", "folds"):
            numbers = getattr(self, name) or ()
            if len(set(numbers)) < len(numbers):
                text = f"'{name}': found one twice: {', '.join(map(str, numbers))}"
                raise conflict(text, name)
        slugs = [_slug(name) for name in self.cells]
        if len(set(slugs)) < len(slugs):
            twice = next(slug for slug in slugs if slugs.count(slug) > 1)
            raise conflict(f"'cells': two names have one folder, {twice!r}; rename one", "cells")
        before: list[str] = []
        for name, cell in self.cells.items():
            for below in filter(None, map(_below, cell.set)):
                if below not in before:
                    raise conflict(
                        f"'cells.{name}': builds on {below!r}, which is no cell above it; "
                        f"{nearest(below, before)}",
                        f"cells.{name}",
                    )
            before.append(name)
        return self

    def only(
        self,
        *,
        seeds: tuple[int, ...] | None = None,
        folds: tuple[int, ...] | None = None,
        split: Split | None = None,
    ) -> "Grid":
        """Return the grid with some of its seeds and folds, or measured on another split.

        Raises:
            RunError: it has no such seed or fold. Of all folds, reading the rows tells.
        """
        chosen: dict[str, Any] = {} if split is None else {"split": split}
        for name, wanted in (("seeds", seeds), ("folds", folds)):
            known = getattr(self, name) or ()
            if wanted is None:
                continue
            every = name == "folds" and self.folds == ()
            if not every and (foreign := sorted(set(wanted) - set(known))):
                raise RunError(
                    f"--{name}: the grid {self.title!r} has no "
                    f"{', '.join(map(str, foreign))} (known: {', '.join(map(str, known)) or '-'})"
                )
            if len(set(wanted)) < len(wanted):
                raise RunError(f"--{name}: names one twice")
            chosen[name] = wanted
        return self.model_copy(update=chosen)


def names() -> tuple[str, ...]:
    """Return the shipped grids, sorted."""
    folder = resources.folder("recipes") / recipes.GRIDS
    return tuple(sorted(path.stem for path in folder.glob("*.yaml")))


def load(path_or_name: str) -> tuple[str, Grid]:
    """Read a grid file, or a shipped grid by its name; return its name with it.

    Raises:
        RecipeError: there is none, or it is malformed.
    """
    path = Path(path_or_name).expanduser()
    if not path.is_file():
        name = path_or_name.removeprefix("recipes/").removeprefix("grids/").removesuffix(".yaml")
        if name not in names():
            raise RecipeError(
                f"{path_or_name}: no such file or shipped grid; {nearest(name, names())}"
            )
        path = resources.folder("recipes") / recipes.GRIDS / f"{name}.yaml"
    shown = recipes.shown_as(path)
    document = recipes.read_mapping(path, shown, ", ".join(Grid.model_fields))
    try:
        return path.stem, Grid.model_validate(document)
    except ValidationError as error:
        found = "\n  ".join(problem.text for problem in problems(error, Grid))
        raise RecipeError(f"{shown}: {found}") from None


@dataclass(frozen=True)
class Place:
    """One training run of a grid."""

    cell: str
    seed: int
    fold: int | None
    folder: Path
    recipe: str
    overrides: tuple[str, ...]


def counted(grid: Grid, folder: Path, root: Path | None) -> Grid:
    """Return the grid with the numbers of its folds, where it takes all that the corpus has.

    Raises:
        RecipeError: the protocol has no folds.
        EmoError: whatever reading recipes and corpora raises.
    """
    if grid.folds != ():
        return grid
    first = places(grid.model_copy(update={"folds": (0,)}), folder)[0]
    found = _experiment(first, root).splits.record["folds"]
    return grid.model_copy(update={"folds": tuple(range(found))})


def places(grid: Grid, folder: Path) -> list[Place]:
    """Return the runs of a grid, cells in their order, seeds and folds within.

    All folds must have been `counted`.
    """
    folder = folder.resolve()  # the paths in overrides must lead there from anywhere
    made = []
    for name, cell in grid.cells.items():
        for seed in grid.seeds:
            for fold in (None,) if grid.folds is None else grid.folds:
                runs_of = {other: _folder(folder, other, seed, fold) for other in grid.cells}
                changes = [_filled(text, runs_of) for text in cell.set]
                changes.append(f"seed={seed}")
                if fold is not None:
                    changes.append(f"data.fold={fold}")
                made.append(Place(name, seed, fold, runs_of[name], cell.recipe, tuple(changes)))
    return made


def _below(override: str) -> str | None:
    value = override.partition("=")[2].strip()
    return value[1:] if value.startswith("@") else None


def _filled(override: str, runs_of: Mapping[str, Path]) -> str:
    below = _below(override)
    return override if below is None else f"{override.partition('=')[0]}={runs_of[below]}"


def _slug(cell: str) -> str:
    return re.sub(r"[^\w+]+", "-", cell.lower()).strip("-")


def _folder(folder: Path, cell: str, seed: int, fold: int | None) -> Path:
    return folder / _slug(cell) / (f"seed{seed}" if fold is None else f"seed{seed}-fold{fold}")


def check(grid: Grid, folder: Path, root: Path | None) -> list[recipes.AnyRecipe]:
    """Refuse a grid that could not be run to its end; return the recipe of each of its places.

    A misspelled last cell or an absent corpus must not show after hours. Corpora are read; no model
    is loaded, and nothing is written.

    Raises:
        RunError: a run in the folder was begun under another recipe or on another run, or a run
            that a cell builds on is no cell and is absent, unfinished or of other rows.
        ProtocolError: cells of different protocols, or no such fold.
        EmoError: whatever reading recipes and corpora raises.
    """
    todo = places(counted(grid, folder, root), folder)
    loaded = [recipes.load(place.recipe, place.overrides) for place in todo]
    for recipe in loaded[1:]:
        protocols.require_comparable(loaded[0].data.protocol, recipe.data.protocol)
    _require_classes(grid, loaded[0])
    read, cells = set(), {place.folder for place in todo}
    for place, recipe in zip(todo, loaded, strict=True):
        if begun := runs.is_run(place.folder):
            _require_same(place, recipe)
        if (rows := (begun, recipe.seed, recipe.data)) not in read:
            read.add(rows)
            _experiment(place, root).rows(grid.split)
        _require_below(place, recipe, cells, root)
    return loaded


def run(grid: Grid, folder: Path, root: Path | None) -> dict[str, Any]:
    """Train and measure whatever is not there yet; return the table.

    Raises:
        EmoError: whatever `check`, training and measuring raise.
    """
    from llm_emo.machine import processes

    if processes().num_processes > 1:
        raise RunError("grid: runs in one process; start it without `accelerate launch`")
    grid = counted(grid, folder, root)
    loaded = check(grid, folder, root)
    todo = places(grid, folder)
    measured = []
    for number, (place, recipe) in enumerate(zip(todo, loaded, strict=True), start=1):
        measured.append(_measured(grid, place, recipe, root, f"[{number}/{len(todo)}]"))
    cells = []
    for name, cell in grid.cells.items():
        own = [done for place, done in zip(todo, measured, strict=True) if place.cell == name]
        cells.append({"cell": name, "recipe": cell.recipe, **_summary(grid, own)})
    unit = cells[0].pop("ci_unit")
    for cell_ in cells[1:]:
        cell_.pop("ci_unit")
    rows = {cell["n"] for cell in cells}
    if len(rows) > 1:
        raise RunError(
            f"{folder}: cells were measured on different numbers of rows: {sorted(rows)}; "
            "remove the folder and run the grid again"
        )
    return {
        "title": grid.title,
        "protocol": loaded[0].data.protocol,
        "split": grid.split,
        "dev_chose": grid.split == "dev" and any(map(_keeps_the_best, loaded)),
        "seeds": list(grid.seeds),
        "folds": None if grid.folds is None else list(grid.folds),
        "metrics": list(grid.metrics),
        "interval": "over seeds" if len(grid.seeds) > 1 else f"over {unit}s (bootstrap)",
        "cells": cells,
        "folder": str(folder),
    }


def _keeps_the_best(recipe: recipes.AnyRecipe) -> bool:
    return recipe.train is not None and recipe.train.keep == "best"


def _require_classes(grid: Grid, recipe: recipes.AnyRecipe) -> None:
    protocol = protocols.get(recipe.data.protocol)
    known = protocol.labels
    if "f1" in grid.metrics and not protocol.averaged_over:
        raise RecipeError(
            f"metrics: f1: {protocol.name} names no classes to average over; take macro_f1, or the "
            f"F1 of a class, such as {CLASS}{known[0]}"
        )
    for name in grid.metrics:
        if name.startswith(CLASS) and name.removeprefix(CLASS) not in known:
            raise RecipeError(f"metrics: {name}: {nearest(name.removeprefix(CLASS), known)}")


@dataclass(frozen=True)
class _Done:
    place: Place
    header: predictions.Header
    rows: Sequence[Prediction]
    clusters: Mapping[str, str]
    training: Mapping[str, Any]


def _measured(
    grid: Grid, place: Place, recipe: recipes.AnyRecipe, root: Path | None, count: str
) -> _Done:
    from llm_emo import labelling  # torch comes with it
    from llm_emo.machine import say

    say(f"{count} {place.cell}, {place.folder.name}")
    trained = None
    if recipe.method.kind == "zero_shot":
        experiment = _experiment(place, root)
    else:
        trained, experiment = _trained(place, recipe, root)
    # What is there already is held against today's recipe, prompt and corpus, and then kept.
    path = labelling.predict(experiment, trained, grid.split, place.folder)
    header, rows = predictions.read(path)
    record = {} if trained is None else trained.environment["training"]
    return _Done(place, header, rows, experiment.clusters, record)


def _experiment(place: Place, root: Path | None) -> AnyExperiment:
    """Read the rows of a place, as they were begun where they were."""
    if runs.is_run(place.folder):
        return opening.from_run(runs.Run(place.folder), [], root)
    return opening.from_recipe(place.recipe, list(place.overrides), root)[0]


def _require_same(place: Place, recipe: recipes.AnyRecipe) -> None:
    """Refuse a run that was begun with another recipe, or on another state of the runs below.

    Args:
        place: where the run lies.
        recipe: what the place names today.
    """
    run, below = runs.Run(place.folder), runs.runs_below(recipe)
    same = (run.folder / "recipe.yaml").read_bytes() == recipes.source(place.recipe).read_bytes()
    same = same and _own(run.overrides) == _own(place.overrides)
    if not same or runs.runs_below(run.recipe).keys() != below.keys():
        raise RunError(
            f"{place.folder}: was begun with another recipe than {place.recipe} is today; "
            "remove it, or choose another folder with -o"
        )
    runs.require_same_below(run, below)


def _require_below(
    place: Place, recipe: recipes.AnyRecipe, cells: Set[Path], root: Path | None
) -> None:
    """Refuse a run below that no cell makes and that cannot be built on.

    A finished place may have lost the run that it was built on.
    """
    run, had = runs.Run(place.folder), {}
    if runs.is_run(run.folder) and run.finished:
        had = runs.runs_below(run.recipe)
    for name, path in runs.runs_below(recipe).items():
        if path in cells or had.get(name) == path:
            continue
        from llm_emo.baselines import opening as of_baselines  # torch comes with it

        experiment = _experiment(place, root)
        assert isinstance(experiment, BaselineExperiment)
        of_baselines.find_run(str(path), experiment)


def _own(overrides: Sequence[str]) -> list[str]:
    """Leave out where the runs below lie: a folder may have been moved with all that is in it.

    Whether they are the same is asked of what they have learned.
    """
    return [text for text in overrides if not _RUN.match(text)]


def _trained(
    place: Place, recipe: recipes.AnyRecipe, root: Path | None
) -> tuple[runs.Run, AnyExperiment]:
    from llm_emo import workflow

    run, begun = runs.Run(place.folder), runs.is_run(place.folder)
    if begun:
        _require_same(place, recipe)  # once more: a run below may just have been trained
    experiment = _experiment(place, root)
    if not begun or not run.finished:
        job = workflow.prepare(experiment)
        if not begun:
            source = recipes.source(place.recipe)
            run = runs.create(place.folder, source, list(place.overrides), experiment)
        workflow.train(job, run, resume=begun)
    return run, experiment


def _summary(grid: Grid, own: Sequence[_Done]) -> dict[str, Any]:
    """Put the folds of a seed together, then the seeds."""
    reports = []
    for seed in grid.seeds:
        parts = [done for done in own if done.place.seed == seed]
        rows = [row for done in parts for row in done.rows]
        clusters: dict[str, str | None] = {}
        for done in parts:
            clusters |= done.clusters
        reports.append(predictions.report(parts[0].header, rows, clusters))
    found = {}
    for name in grid.metrics:
        values = [_value(report, name) for report in reports]
        found[name] = {"mean": statistics.fmean(values), "values": values} | _interval(
            values, reports[0]["ci"].get(name)
        )
    seconds = [float(v) for v in _recorded(own, "seconds_per_epoch")]
    rates = [float(v) for v in _recorded(own, "examples_per_second")]
    memory = [int(v) for v in _recorded(own, "peak_memory_bytes")]
    parameters = [int(v) for v in _recorded(own, "trainable_parameters")]
    return {
        "method": own[0].header.model,
        "n": reports[0]["n"],
        "ci_unit": reports[0]["ci_unit"],
        "metrics": found,
        "trainable_parameters": max(parameters, default=0),
        "seconds_per_epoch": statistics.fmean(seconds) if seconds else None,
        "examples_per_second": statistics.fmean(rates) if rates else None,
        "peak_memory_bytes": max(memory, default=None),
        "fusion_weights": _mean(list(_recorded(own, "fusion_weights"))),
    }


def _recorded(own: Sequence[_Done], key: str) -> Iterator[Any]:
    return (value for done in own if (value := done.training.get(key)) is not None)


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    if not found:
        return None
    return {name: statistics.fmean(one[name] for one in found) for name in found[0]}


def _value(report: Mapping[str, Any], name: str) -> float:
    if name.startswith(CLASS):
        return float(report["per_class"][name.removeprefix(CLASS)]["f1"])
    return float(report[name])


def _interval(values: Sequence[float], bootstrap: Sequence[float] | None) -> dict[str, Any]:
    """Return the 95 % interval: Student's over seeds, or the bootstrap's of a single one."""
    if len(values) == 1:
        low, high = bootstrap if bootstrap is not None else (None, None)
        return {"low": low, "high": high}
    from scipy.stats import t as student  # comes with scikit-learn, and takes a while

    half = (
        float(student.ppf(0.975, len(values) - 1))
        * statistics.stdev(values)
        / math.sqrt(len(values))
    )
    mean = statistics.fmean(values)
    return {"low": mean - half, "high": mean + half}
