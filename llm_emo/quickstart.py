"""The embedded default, end to end: a real model and real ratings, no hub and no GPU."""

import shutil
from pathlib import Path
from typing import Any

from llm_emo import export, fetch, labelling, predictions, recipes, runs, workflow
from llm_emo.errors import RunError
from llm_emo.experiment import Experiment
from llm_emo.machine import say

RECIPES = ("vader/zero_shot", "vader/lora", "vader/p_tuning_v2")
ROWS_COMPARED = 16
"""Rows on which the exported adapters are compared with stock PEFT, each label by itself."""


def run(folder: Path) -> dict[str, Any]:
    """Run the three recipes into `folder`, taking up what an earlier call left.

    Raises:
        RunError: the folder holds runs of other recipes than today's.
        JobFailed: the package index cannot be reached, or the disk is full.
    """
    say(f"cache folder: {fetch.cache_dir()}")
    result: dict[str, Any] = {"methods": [], "exports": {}, "cache": str(fetch.cache_dir())}
    for name in RECIPES:
        recipe = recipes.load_llm(name)
        experiment = Experiment.prepare(recipe, None)
        kind = recipe.method.kind
        target = folder / kind
        finished = None
        if not isinstance(recipe.method, recipes.ZeroShot):
            finished = _trained(experiment, recipes.source(name), target)
        say(f"{kind}: predicting the test split")
        path = labelling.predict(experiment, finished, "test", target)
        header, rows = predictions.read(path)
        report = predictions.report(header, rows, experiment.clusters)
        runs.write_json(target / "test.report.json", report)
        trained = {} if finished is None else finished.environment["training"]
        result["methods"].append(
            {
                "method": kind,
                **{key: report[key] for key in ("n", "accuracy", "macro_f1", "parse_rate", "ci")},
                "examples_per_second": trained.get("examples_per_second"),
            }
        )
        if finished is not None:
            result["exports"][kind] = _exported(experiment, finished, folder / f"{kind}-peft")
        result |= {"model": recipe.model.name, "protocol": header.protocol, "seed": recipe.seed}
    runs.write_json(folder / "quickstart.json", result)
    return result


def _trained(experiment: Experiment, source: Path, target: Path) -> runs.Run:
    if runs.is_run(target):
        run = runs.open_run(target)
        if (target / "recipe.yaml").read_bytes() != source.read_bytes():
            raise RunError(
                f"{target}: was trained by another recipe than today's {source}; choose another "
                "folder with -o"
            )
        if run.finished:
            say(f"{target}: already trained")
            return run
        workflow.train(workflow.prepare(experiment), run, resume=True)
        return run
    runs.require_free(target)
    job = workflow.prepare(experiment)
    run = runs.create(target, source, [], experiment)
    workflow.train(job, run, resume=False)
    return run


def _exported(experiment: Experiment, run: runs.Run, target: Path) -> dict[str, Any]:
    if target.exists():  # written by an earlier call, perhaps from another training
        shutil.rmtree(target)
    export.export(experiment, run, target, "peft")
    exact = recipes.load_llm(str(run.folder / "recipe.yaml"), ["model.dtype=float32"])
    precise = Experiment.prepare(exact, None)
    labeller = labelling.open_labeller(precise, run)
    difference = export.difference_from_stock(labeller, target, ROWS_COMPARED)
    return {"folder": str(target), "difference": difference, "rows": ROWS_COMPARED}
