"""What a specialised model's recipe comes to, before anything is trained."""

from collections import Counter
from pathlib import Path
from typing import Any

from llm_emo.baselines import opening
from llm_emo.baselines.classifier import Classifier
from llm_emo.experiment import BaselineExperiment
from llm_emo.protocols import leaks
from llm_emo.types import SPLITS


def fit(experiment: BaselineExperiment, source: Path) -> dict[str, Any]:
    """Make the model and the items of a few rows; return what was found, rows by class.

    Raises:
        ModelError: a part of the model cannot be had or used.
        RunError: a run that the recipe builds on is absent, or parts other rows.
        ProtocolError: a split that training needs is empty.
        DatasetError: a sound file cannot be read.
    """
    names, recipe = experiment.protocol.labels, experiment.recipe
    result: dict[str, Any] = {
        "recipe": str(source),
        "protocol": experiment.protocol.name,
        "labels": list(names),
        "splits": {},
        "record": experiment.splits.record,
    }
    for split in SPLITS:
        needed = split == "train" or (split == "dev" and recipe.train is not None)
        if not needed and not getattr(experiment.splits, split):
            continue
        rows = experiment.rows(split)
        counts = Counter(row.gold for row in rows)
        result["splits"][split] = {"rows": len(rows), **{name: counts[name] for name in names}}
    model = opening.create(experiment)
    facts: dict[str, Any] = {"method": recipe.method.kind}
    if isinstance(model, Classifier):
        facts["parameters"] = sum(value.numel() for value in model.model.parameters())
        if recipe.method.kind == "encoder":  # tokenizing is quick, and tells which texts are cut
            for split in result["splits"]:
                model.items(experiment.rows(split), split, augmented=False)
        told = model.facts()  # before the trial: its few rows are no facts of their split
        some = experiment.rows("train")[:4]
        model.batch(model.items(some, "train", augmented=False))
    else:
        facts["parameters"], told = model.parameters, model.facts()
    result["facts"] = facts | {name: value for name, value in told.items() if value != {}}
    if experiment.splits.train and experiment.splits.test:
        result["test_texts_in_train"] = len(leaks(experiment.splits.train, experiment.splits.test))
    return result
