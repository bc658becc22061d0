"""Tables of recipes: each cell trained once, all measured on the same rows."""

import json
from pathlib import Path

import program
import pytest

from llm_emo import experiment, grid, recipes
from llm_emo.errors import ProtocolError, RunError
from llm_emo.machine import PeakMemory

TABLE = """
title: two floors
split: dev
metrics: [accuracy, "f1:neutral"]
seeds: [0, 1]
cells:
  "majority": {recipe: mastodon/majority}
  "linear": {recipe: mastodon/linear, set: ["method.features.strength=5.0"]}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text(TABLE)
    return path


def run(file, *options):
    arguments = ("--data-root", program.FIXTURES, "-o", file.parent / "runs", *options)
    return program.call("grid", file, *arguments)


def test_a_grid_gives_every_cell_s_mean_and_values_over_the_seeds(file):
    [made] = json.loads(run(file, "--json").ok().out)["grids"]
    assert [cell["cell"] for cell in made["cells"]] == ["majority", "linear"]
    for cell in made["cells"]:
        accuracy = cell["metrics"]["accuracy"]
        assert accuracy["mean"] == pytest.approx(sum(accuracy["values"]) / 2)
        assert len(accuracy["values"]) == 2
        assert accuracy["low"] <= accuracy["mean"] <= accuracy["high"]
    report = json.loads(
        program.call(
            "evaluate", file.parent / "runs" / "table" / "linear" / "seed1", "--split", "dev",
            "--data-root", program.FIXTURES, "--json",
        ).ok().out
    )  # fmt: skip
    linear = made["cells"][1]["metrics"]
    assert linear["accuracy"]["values"][1] == report["accuracy"]
    assert linear["f1:neutral"]["values"][1] == report["per_class"]["neutral"]["f1"]


def test_what_is_finished_is_not_run_again(file):
    run(file).ok()
    folder = file.parent / "runs" / "table"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    run(file).ok()
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {path for path in before if path.suffix != ".lock"} <= set(after)
    assert all(after[path] == before[path] for path in before if path.suffix != ".lock")


def test_a_changed_cell_is_not_taken_from_the_old_run(file):
    run(file).ok()
    file.write_text(TABLE.replace("strength=5.0", "strength=6.0"))
    run(file).refused("begun with another recipe", "linear")


def folds_of(file, text, *options):
    file.write_text(text)
    [made] = json.loads(run(file, *options, "--json").ok().out)["grids"]
    return made["folds"], made["cells"][0]["n"]


def test_all_folds_are_those_that_the_corpus_has(file):
    text = (
        "title: a floor\nsplit: test\nmetrics: [accuracy]\nseeds: [0]\nfolds: all\n"
        "cells: {majority: {recipe: emodb/majority}}\n"
    )
    whole = folds_of(file, text)
    assert whole[0] == [0, 1, 2, 3]  # the fixture's speakers
    assert whole == folds_of(file, text.replace("all", "[0, 1, 2, 3]"))
    assert "4 folds together" in run(file).ok().out
    file.write_text(text)
    run(file).ok()  # what is there is found again
    assert folds_of(file, text, "--folds", "2,3")[0] == [2, 3]
    run(file, "--folds", "4").refused("found fold 4; expected 0 to 3")
    file.write_text(text.replace("emodb/", "mastodon/"))
    run(file).refused("data.fold", "has no folds")
    file.write_text(text.replace("all", "[]"))
    run(file).refused("'folds'", "numbers, or all")


def test_a_table_on_dev_says_that_dev_chose_the_states(file):
    vectors = file.with_name("vectors.txt")
    vectors.write_text("".join(f"{word} 0.5 -0.5 0.25\n" for word in ("a", "the", "you")))
    for keep, said in (("best", True), ("last", False)):
        changes = [f"method.vectors={vectors}", "train.epochs=1", f"train.keep={keep}",
                   "train.early_stopping_patience=null"]  # fmt: skip
        path = file.with_stem(keep)
        cell = {"recipe": "mastodon/text_cnn", "set": changes}
        path.write_text(TABLE.replace("[0, 1]", "[0]") + f'  "network": {json.dumps(cell)}\n')
        printed = run(path).ok().out
        assert ("dev split, which also chose the states that are measured," in printed) == said
    assert "also chose" not in run(file).ok().out  # floors: dev chooses nothing of them
    file.write_text(TABLE.replace("split: dev", "split: test"))
    assert "chose" not in run(file).ok().out


def test_grids_of_one_name_do_not_share_a_folder(file, tmp_path):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / file.name
    other.write_text(TABLE)
    run(file, other).refused("two grids are called table")
    assert not (tmp_path / "runs").exists()


def test_a_cell_that_builds_on_fewer_runs_than_its_run_is_told(tmp_path):
    made = grid.Grid(
        title="t", split="dev", metrics=("accuracy",), seeds=(0,), folds=(0,),
        cells={"fusion": grid.Cell(recipe="emodb/fusion", set=("method.text_run=null",))},
    )  # fmt: skip
    [place] = grid.places(made, tmp_path)
    place.folder.mkdir(parents=True)
    (place.folder / "recipe.yaml").write_bytes(recipes.source(place.recipe).read_bytes())
    begun = ["method.text_run=runs/text", *place.overrides[1:]]
    (place.folder / "overrides.json").write_text(json.dumps(begun))
    (place.folder / "environment.json").write_text('{"run": "a", "data_root": null, "files": {}}')
    with pytest.raises(RunError, match="begun with another recipe"):
        grid.check(made, tmp_path, program.FIXTURES)


@pytest.mark.parametrize(
    ("old", "new", "pieces"),
    [
        ("accuracy,", "acuracy,", ["did you mean 'accuracy'"]),
        ("f1:neutral", "f1:neutrl", ["did you mean 'neutral'"]),
        ("cells:", "cels:", ["did you mean 'cells'"]),
        ("mastodon/linear", "mastodon/liner", ["did you mean 'mastodon/linear'"]),
        ("features.strength=5.0", "features.strenth=5.0", ["did you mean 'strength'"]),
        ('"method.features.strength=5.0"', '"method.encoder_run=@linear"', ["no cell above it"]),
        ("mastodon/majority", "vader/majority", ["mastodon3", "vader"]),
        ("accuracy,", "f1,", ["names no classes to average over"]),
        ("[0, 1]", "[0, 0]", ["seeds", "twice"]),
        ('"linear":', '"Majority!":', ["two names have one folder"]),
    ],
)
def test_what_is_wrong_in_a_grid_is_told_before_anything_is_trained(file, old, new, pieces):
    assert old in TABLE
    file.write_text(TABLE.replace(old, new))
    refused = run(file)
    refused.refused(*pieces)
    assert "Value error" not in refused.err
    assert not (file.parent / "runs").exists()


def test_an_absent_corpus_is_told_before_anything_is_trained(file, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text(TABLE.replace("seeds: [0, 1]", "seeds: [1]"))
    arguments = ("grid", file, second, "-o", tmp_path / "runs", "--data-root")
    absent = program.call(*arguments, tmp_path)
    absent.refused("mastodon", "no file")
    assert "[1/" not in absent.err
    assert not (tmp_path / "runs").exists()


def test_rows_of_a_later_cell_or_table_are_read_before_anything_is_trained(file, tmp_path):
    good, bad = TABLE, TABLE.replace("method.features.strength=5.0", "data.hub=owner/name@1.0")
    assert good != bad  # no form of this corpus on the hub is known
    file.write_text(bad)
    (tmp_path / "good.yaml").write_text(good)
    for tables in ((file,), (tmp_path / "good.yaml", file)):
        refused = program.call(
            "grid", *tables, "-o", tmp_path / "runs", "--data-root", program.FIXTURES
        )
        refused.refused("no Hugging Face form of this corpus")
        assert "[1/" not in refused.err
        assert not (tmp_path / "runs").exists()


def test_a_table_that_is_there_is_shown_without_naming_the_data_root_again(file):
    run(file).ok()
    program.call("grid", file, "-o", file.parent / "runs").ok()


def test_a_cell_can_build_on_the_run_of_another_with_the_same_seed_and_fold(tmp_path):
    below, above = grid.Cell(recipe="a"), grid.Cell(recipe="b", set=("method.encoder_run=@one x",))
    made = grid.Grid(
        title="t", split="dev", metrics=("accuracy",), seeds=(3, 4), folds=(0, 1),
        cells={"one x": below, "two": above},
    )  # fmt: skip
    found = {(p.cell, p.seed, p.fold): p for p in grid.places(made, tmp_path)}
    assert len(found) == 8
    for (cell, seed, fold), place in found.items():
        assert f"seed={seed}" in place.overrides
        assert f"data.fold={fold}" in place.overrides
        if cell == "two":
            assert f"method.encoder_run={found['one x', seed, fold].folder}" in place.overrides


@pytest.mark.parametrize("name", grid.names())
def test_every_shipped_grid_names_recipes_and_settings_that_are_there(name, tmp_path):
    made = grid.load(name)[1]
    if made.folds == ():
        made = made.only(folds=(0,))
    protocols = {
        recipes.load(place.recipe, place.overrides).data.protocol
        for place in grid.places(made, tmp_path)
    }
    assert len(protocols) == 1


@pytest.mark.parametrize("name", grid.names())
def test_every_shipped_grid_finds_its_rows_classes_and_folds(name, tmp_path, shared_data):
    made = grid.counted(grid.load(name)[1], tmp_path, shared_data)
    recipe = grid.check(made, tmp_path, shared_data)[0]
    if made.folds is not None:  # every row is tested once, or a number is of some of them only
        assert list(made.folds) == list(range(len(made.folds)))
        data = recipe.data.model_copy(update={"fold": len(made.folds)})
        beyond = recipe.model_copy(update={"data": data})
        with pytest.raises(ProtocolError, match="fold"):
            experiment.prepare(beyond, shared_data)


@pytest.mark.parametrize("name", grid.names())
def test_every_shipped_grid_shows_what_costs_nothing_beside_what_learns(name):
    _, made = grid.load(name)
    assert {"majority", "linear"} <= {Path(cell.recipe).name for cell in made.cells.values()}


def test_an_unknown_grid_names_the_nearest():
    program.call("grid", "mastodn").refused("mastodn", "no such file or shipped grid")


def test_what_a_run_held_is_not_what_ran_before_it_held(file):
    held = bytearray(500 * 2**20)
    before = PeakMemory.begin().read()
    del held
    if before is None:
        pytest.skip("only Linux can forget a peak")
    [made] = json.loads(run(file, "--json").ok().out)["grids"]
    for cell in made["cells"]:
        assert 2**20 < cell["peak_memory_bytes"] < before - 300 * 2**20


@pytest.mark.parametrize("seeds", ["[0]", "[0, 1]"])
def test_a_table_is_shown_with_what_it_took_in_100_columns(file, seeds):
    text = TABLE.replace("[0, 1]", seeds).replace("two floors", "two floors " * 10)
    text = text.replace('"linear"', '"TF-IDF of words, logistic regression, 28"')
    file.write_text(text.replace('[accuracy, "f1', '[accuracy, macro_f1, weighted_f1, "f1'))
    out = run(file).ok().out
    assert max(map(len, out.splitlines())) <= 100
    for title in ("accuracy", "f1:neutral", "parameters", "s/epoch", "rows/s", "memory"):
        assert title in out
    assert ("±" in out) == (seeds == "[0, 1]")


def test_some_seeds_of_a_grid_can_be_run_and_the_others_later(file):
    [some] = json.loads(run(file, "--seeds", "1", "--json").ok().out)["grids"]
    [whole] = json.loads(run(file, "--json").ok().out)["grids"]
    for one, both in zip(some["cells"], whole["cells"], strict=True):
        accuracy = both["metrics"]["accuracy"]["values"]
        assert one["metrics"]["accuracy"]["values"] == accuracy[1:]
    run(file, "--seeds", "1,5").refused("--seeds", "5", "known: 0, 1")
    run(file, "--folds", "0").refused("--folds", "known: -")
    run(file, "--seeds", "one").refused("--seeds", "one")


def test_the_runs_of_a_table_can_be_measured_on_another_split(file):
    dev = json.loads(run(file, "--json").ok().out)["grids"][0]
    runs = file.parent / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    test = json.loads(run(file, "--json", "--split", "test").ok().out)["grids"][0]
    after = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    assert before.items() < after.items()  # nothing was trained anew
    assert {path.name for path in after.keys() - before.keys()} == {"test.predictions.jsonl"}
    assert (dev["split"], test["split"]) == ("dev", "test")
    assert dev["cells"][0]["n"] != test["cells"][0]["n"]
    run(file, "--split", "tset").refused("did you mean 'test'")
