"""Grids whose cells build on other cells' runs."""

import json
import shutil

import pytest
from program import FIXTURES, call
from test_encoder import save

from llm_emo import runs

SMALL = ["train.epochs=1", "train.batch_size=4", "train.micro_batch_size=4",
         "data.dev_fraction=0.3"]  # fmt: skip
NETWORK = ("method.network={cnn_lstm: true, residual: true, dropout: 0.0, reduced: 8, units: 4, "
           "head: 8}")  # fmt: skip


def table(tiny):
    head = "method.head={max_length: 12, dropout: 0.0}"
    below = {"recipe": "friends/encoder", "set": [f"method.name={tiny}", head, *SMALL]}
    built = ["method.encoder_run=@plain encoder", NETWORK, *SMALL]
    return {
        "title": "an encoder, and the dialogue network over it",
        "split": "dev",
        "metrics": ["macro_f1"],
        "seeds": [0],
        "cells": {
            "plain encoder": below,
            "whole": {"recipe": "friends/roberta_cnn_lstm", "set": built},
        },
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A table that was run with its folder given relative to another one; to be read only."""
    root = tmp_path_factory.mktemp("grid")
    (root / "encoder").mkdir()
    (root / "table.yaml").write_text(json.dumps(table(save(root / "encoder"))))  # JSON is YAML
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_EMO_CACHE", str(root / "cache"))
        patch.chdir(root)
        call("grid", "table.yaml", "--data-root", FIXTURES, "-o", "runs").ok()
    return root


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """The same, to be changed; it lies elsewhere than where it was made."""
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made, tmp_path / "moved")
    return tmp_path / "moved"


def again(folder):
    return call("grid", folder / "table.yaml", "--data-root", FIXTURES, "-o", folder / "runs")


def places(folder):
    cells = folder / "runs" / "table"
    return cells / "plain-encoder" / "seed0", cells / "whole" / "seed0"


def written(folder):
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def change_weights(run):
    for path in (run / "adapter").rglob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.unlink()  # under another name it may be the file of the run above
        path.write_bytes(content)


def forget_below(run):
    """Make the run one that was begun before this was recorded."""
    path = run / "environment.json"
    content = json.loads(path.read_text())
    del content["below"]
    path.write_text(json.dumps(content))


def test_a_run_that_builds_on_another_cell_s_opens_from_anywhere(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    below, above = places(made)
    assert runs.Run(above).recipe.method.encoder_run == str(below)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_folder_that_was_moved_whole_is_kept(folder, recorded):
    if not recorded:
        forget_below(places(folder)[1])
    before = written(folder)
    again(folder).ok()
    assert written(folder) == before


def test_a_cell_whose_run_below_came_to_the_same_end_again_is_kept(folder):
    below, above = places(folder)
    shutil.rmtree(below)
    before = written(above)
    again(folder).ok()
    assert written(above) == before


@pytest.mark.parametrize("recorded", [True, False])
def test_a_cell_is_not_kept_over_a_run_that_has_learned_something_else(folder, recorded):
    below, above = places(folder)
    if not recorded:
        forget_below(above)
    change_weights(below)
    again(folder).refused(str(above), f"built on {below}", "trained anew", f"remove {above}")


def test_an_interrupted_run_is_not_continued_over_a_run_that_has_learned_something_else(folder):
    below, above = places(folder)
    shutil.rmtree(above / "adapter")
    change_weights(below)
    again(folder).refused(str(above), "trained anew")
    overrides = json.loads((above / "overrides.json").read_text())
    moved = [f"method.encoder_run={below}" if "encoder_run" in text else text for text in overrides]
    (above / "overrides.json").write_text(json.dumps(moved))
    resume = ("-o", above, "--data-root", FIXTURES, "--resume")
    call("train", above / "recipe.yaml", *resume).refused("trained anew")


def name_run(folder, path):
    """Let the cell that builds on another one's run name a run by its path."""
    text = (folder / "table.yaml").read_text()
    assert "@plain encoder" in text
    (folder / "table.yaml").write_text(text.replace("@plain encoder", str(path)))


@pytest.mark.parametrize("same", [True, False])
def test_a_cell_that_names_another_run_is_kept_where_that_has_learned_the_same(folder, same):
    below, above = places(folder)
    other = shutil.copytree(below, folder / "other")
    name_run(folder, other)
    before = written(folder)
    if same:
        again(folder).ok()
        assert written(folder) == before
    else:
        change_weights(other)
        again(folder).refused(str(above), f"built on {other}", f"remove {above}")


@pytest.mark.parametrize("there", [True, False])
def test_a_run_that_no_cell_makes_must_be_finished_before_anything_is_trained(folder, there):
    below, _ = places(folder)
    other = folder / "other"
    if there:
        shutil.copytree(below, other)
        shutil.rmtree(other / "adapter")
    name_run(folder, other)
    shutil.rmtree(folder / "runs")
    refused = again(folder)
    refused.refused(str(other), "training has not finished" if there else "no run folder")
    assert "[1/" not in refused.err
    assert not (folder / "runs").exists()


def test_a_finished_cell_is_kept_when_the_run_that_it_was_built_on_is_gone(folder):
    _, above = places(folder)
    name_run(folder, folder / "gone")
    overrides = json.loads((above / "overrides.json").read_text())
    named = [f"method.encoder_run={folder / 'gone'}" if "_run=" in text else text
             for text in overrides]  # fmt: skip
    (above / "overrides.json").write_text(json.dumps(named))
    (above / "dev.predictions.jsonl").unlink()  # they were made of the run under its other name
    before = written(above / "adapter")
    again(folder).ok()
    assert written(above / "adapter") == before


def test_a_run_that_is_named_by_its_path_is_held_against_what_it_was(folder):
    below, above = places(folder)
    name_run(folder, below)
    change_weights(below)
    again(folder).refused(str(above), f"built on {below}", "trained anew")
