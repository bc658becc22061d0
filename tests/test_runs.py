import errno
import json
import re
from pathlib import Path

import program
import pytest

from llm_emo import recipes, runs
from llm_emo.errors import JobFailed, RunError
from llm_emo.experiment import Experiment

OVERRIDES = ["seed=3", "train.epochs=1"]


@pytest.fixture(scope="module")
def experiment():
    return Experiment.prepare(recipes.load("mastodon/lora", OVERRIDES), program.FIXTURES)


def create(folder, experiment):
    return runs.create(folder, recipes.source("mastodon/lora"), OVERRIDES, experiment)


def test_a_run_gives_back_its_recipe_with_the_overrides(tmp_path, experiment):
    run = create(tmp_path / "deep/run", experiment)
    assert run.recipe == experiment.recipe
    assert runs.open_run(tmp_path / "deep/run") == run
    own = (run.folder / "recipe.yaml").read_bytes()
    assert own == recipes.source("mastodon/lora").read_bytes()
    assert (run.folder / "prompt.yaml").read_text("utf-8") == experiment.prompt.verbatim
    assert not run.finished


def test_the_environment_says_what_a_number_depends_on(tmp_path, experiment):
    environment = create(tmp_path / "run", experiment).environment
    assert environment["versions"]["torch"]
    assert set(runs.PACKAGES) < set(environment["versions"])
    assert environment["files"] == experiment.files
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in environment["files"].values())
    assert environment["splits"] == experiment.splits.record
    assert environment["data_root"] == str(program.FIXTURES)
    assert environment["cores"] >= 1


def test_two_runs_never_have_one_id(tmp_path, experiment):
    one, two = (create(tmp_path / name, experiment) for name in ("one", "two"))
    assert one.id != two.id


def test_an_empty_folder_may_become_a_run(tmp_path, experiment):
    (tmp_path / "run").mkdir()
    assert runs.is_run(create(tmp_path / "run", experiment).folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_is_never_overwritten(tmp_path, experiment):
    create(tmp_path / "run", experiment)
    with pytest.raises(RunError, match=r"holds a run already.* -o, or .*--resume"):
        create(tmp_path / "run", experiment)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_run_is_never_overwritten(kind, tmp_path, experiment):
    place = tmp_path / "run"
    if kind == "folder":
        place.mkdir()
    (place / "a" if kind == "folder" else place).write_text("mine")
    with pytest.raises(RunError, match=r"is not empty|is a file"):
        create(place, experiment)
    assert (place / "a" if kind == "folder" else place).read_text() == "mine"


def test_a_run_folder_appears_complete_or_not_at_all(tmp_path, experiment, monkeypatch):
    def full(self, *_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(JobFailed, match=r"/run: cannot be written: No space left"):
        create(tmp_path / "run", experiment)
    assert not list(tmp_path.iterdir())


def test_json_is_replaced_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    runs.write_json(path, {"wort": "müde"})
    assert "müde" in path.read_text("utf-8")
    with pytest.raises(TypeError):
        runs.write_json(path, {"bad": object()})
    assert json.loads(path.read_text("utf-8")) == {"wort": "müde"}
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_the_default_folder_is_named_after_the_recipe():
    name = runs.default_folder(recipes.source("mastodon/lora"))
    assert name.as_posix() == "runs/mastodon-lora"
