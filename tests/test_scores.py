"""What the README promises of the bundled model, measured: minutes each, hence slow."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_the_quickstart_learns_and_its_adapters_are_stock_pefts(tmp_path: Path):
    from llm_emo import quickstart

    result = quickstart.run(tmp_path)

    scores = {row["method"]: row["macro_f1"] for row in result["methods"]}
    assert scores["lora"] - scores["zero_shot"] >= 0.40
    assert scores["p_tuning_v2"] - scores["zero_shot"] >= 0.40
    assert {row["n"] for row in result["methods"]} == {840}
    assert result["exports"]["lora"]["difference"] <= 1e-4
    assert result["exports"]["p_tuning_v2"]["difference"] <= 1e-3


@pytest.mark.parametrize(
    ("name", "rows", "floor"),
    [
        ("mastodon/lora", 1142, {"accuracy": 0.66, "macro_f1": 0.66}),
        ("sst2/lora", 1821, {"accuracy": 0.91}),
    ],
)
def test_a_recipe_reaches_its_score_on_all_test_rows(
    name: str, rows: int, floor: dict[str, float], tmp_path: Path, shared_data: Path
):
    from llm_emo import labelling, predictions, recipes, runs, workflow
    from llm_emo.experiment import Experiment

    experiment = Experiment.prepare(recipes.load(name), shared_data)
    job = workflow.prepare(experiment)
    run = runs.create(tmp_path / "run", recipes.source(name), [], experiment)
    workflow.train(job, run, resume=False)
    labelling.predict(experiment, run, "test", run.folder)

    report = predictions.report(*predictions.read(runs.predictions_path(run.folder, "test")))
    assert report["n"] == rows
    assert {metric: report[metric] for metric in floor if report[metric] < floor[metric]} == {}
