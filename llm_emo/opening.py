"""What a command line names, opened: recipes with their corpus, runs, predictions."""

import dataclasses
from pathlib import Path

from llm_emo import prompts, recipes, runs
from llm_emo.errors import RunError
from llm_emo.experiment import AnyExperiment, BaselineExperiment, Experiment, data_root, prepare
from llm_emo.types import Split


def from_recipe(recipe: str, overrides: list[str], root: Path | None) -> tuple[AnyExperiment, Path]:
    """Prepare a recipe's experiment; return it with the recipe's file.

    Args:
        recipe: A recipe file, or the name of a shipped one.
        overrides: `KEY=VALUE`, applied in order.
        root: The data root that was given, if any.
    """
    loaded = recipes.load(recipe, overrides)
    return prepare(loaded, data_root(root)), recipes.source(recipe)


def from_run(run: runs.Run, overrides: list[str], root: Path | None) -> AnyExperiment:
    """Prepare a run's experiment again, from its own recipe and prompt.

    Raises:
        RunError: the corpus files are not those that the run was begun with, or the protocol has
            other classes by now.
    """
    recipe = recipes.load(str(run.folder / "recipe.yaml"), [*run.overrides, *overrides])
    recorded = run.environment
    found = data_root(root) or (recorded["data_root"] and Path(recorded["data_root"]))
    experiment: AnyExperiment
    if isinstance(recipe, recipes.BaselineRecipe):
        experiment = BaselineExperiment.prepare(recipe, found)
        # An LLM's labels are in its adapter's fingerprint.
        if run.classes != experiment.labels.names:
            raise RunError(
                f"{run.folder}: learned the classes {', '.join(run.classes)}, and the protocol "
                f"{experiment.protocol.name} has {', '.join(experiment.labels.names)}; train it "
                "again, or use the version of llm_emo that it was trained with"
            )
    else:
        begun, prompt = run.recipe, None
        if isinstance(begun, recipes.Recipe) and recipe.prompt.name == begun.prompt.name:
            # The shipped prompt may have been edited since; the adapter learned the run's own.
            kept = prompts.load(str(run.folder / "prompt.yaml"))
            prompt = dataclasses.replace(kept, name=Path(recipe.prompt.name).stem)
        experiment = Experiment.prepare(recipe, found, prompt)
    if experiment.files != recorded["files"]:
        raise RunError(
            f"{run.folder}: the corpus files have changed since the run was begun; "
            "name the data root that it was begun with (--data-root)"
        )
    return experiment


def predicted(
    source: str,
    split: Split,
    *,
    mode: str | None,
    adapter: Path | None,
    output: Path | None,
    root: Path | None,
    overrides: list[str],
) -> tuple[Path, AnyExperiment]:
    """Predict a split of a run or of a zero-shot recipe, where that is not done yet.

    With `adapter`, the zero-shot recipe's model wears it: an adapter from elsewhere.

    Returns:
        The predictions file, and the experiment that it belongs to.

    Raises:
        RunError: `source` is neither a run nor a recipe that needs no training.
        AdapterError: the adapter cannot be read, or no recipe could state it.
    """
    changes = [*overrides, *([] if mode is None else [f"inference.mode={mode}"])]
    if mode is not None:
        begun = runs.is_run(Path(source))
        what = str(Path(source) / "recipe.yaml") if begun else source
        before = [*runs.Run(Path(source)).overrides, *overrides] if begun else overrides
        if isinstance(recipes.load(what, before), recipes.BaselineRecipe):
            raise RunError(
                f"--mode: {source} is a specialised model, which neither scores nor writes"
            )
    run = None
    if adapter is not None and (Path(source).is_dir() or output is None):
        raise RunError(
            "--adapter: goes with a zero-shot recipe and -o FOLDER; a run has its own adapter"
        )
    if runs.is_run(Path(source)):
        run = runs.Run(Path(source))
        experiment = from_run(run, changes, root)
        folder = output or run.folder
    else:
        if Path(source).is_dir():
            raise RunError(f"{source}: is a folder, but no run folder; it has no environment.json")
        experiment, path = from_recipe(source, changes, root)
        if not isinstance(experiment.recipe.method, recipes.ZeroShot):
            raise RunError(
                f"{path}: method {experiment.recipe.method.kind} must be trained first: "
                f"`llm-emo train {source}`; then name its run folder here"
            )
        folder = output or runs.default_folder(path)
    experiment.rows(split)  # an empty split is refused before torch is loaded
    from llm_emo import labelling

    if adapter is None:
        return labelling.predict(experiment, run, split, folder), experiment
    from llm_emo.models import adapters

    assert isinstance(experiment, Experiment)
    recipe = experiment.recipe.model_copy(update={"method": adapters.method_of(adapter)})
    experiment = dataclasses.replace(experiment, recipe=recipe)
    return labelling.predict(experiment, labelling.Foreign(adapter), split, folder), experiment
