"""Both stages of paper 000 as a user runs them, on the fixtures and a tiny encoder."""

import json
import shutil

import pytest
from conftest import FIXTURES
from program import call, interrupted, settings
from test_encoder import save

from llm_emo import datasets, protocols
from llm_emo.baselines import exported

SMALL = ("train.epochs=2", "train.batch_size=4", "train.micro_batch_size=4",
         "data.dev_fraction=0.3")  # fmt: skip
NETWORK = ("method.network={cnn_lstm: true, residual: true, dropout: 0.0, reduced: 8, units: 4, "
           "head: 8}",)  # fmt: skip


def train(recipe, folder, *changes):
    return call("train", recipe, "-o", folder, "--data-root", FIXTURES, *settings(*SMALL, *changes))


@pytest.fixture(scope="module")
def below(tmp_path_factory):
    """A finished encoder run on Friends; to be read, never written."""
    root = tmp_path_factory.mktemp("below")
    (root / "encoder").mkdir()
    tiny = save(root / "encoder")
    head = "method.head={max_length: 12, dropout: 0.0}"
    train("friends/encoder", root / "run", f"method.name={tiny}", head).ok()
    return root / "run"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "cache"))


def test_a_run_predicts_every_scored_row_when_its_encoder_s_run_is_gone(below, tmp_path):
    encoder, run = tmp_path / "encoder", tmp_path / "run"
    shutil.copytree(below, encoder)
    train("friends/roberta_cnn_lstm", run, f"method.encoder_run={encoder}", *NETWORK).ok()
    training = json.loads((run / "environment.json").read_text())["training"]
    assert training["splits"]["train"]["features_cached"] is False
    shutil.rmtree(encoder)  # it has had its day
    call("predict", run, "--split", "test").ok()
    protocol = protocols.get("friends7")
    rows = protocols.rows(protocol, datasets.read("friends", FIXTURES), seed=0, dev_fraction=0.3)
    uids = [row.utterance.uid for row in rows.test]
    assert any(row.history for row in rows.test)
    lines = (run / "test.predictions.jsonl").read_text().splitlines()[1:]
    assert sorted(json.loads(line)["uid"] for line in lines) == sorted(uids)
    call("evaluate", run, "--split", "test").ok()


def test_an_exported_dialogue_network_labels_and_leaves_the_cache_as_it_was(
    below, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    train("friends/roberta_cnn_lstm", run, f"method.encoder_run={below}", *NETWORK).ok()
    call("export", run, "-o", tmp_path / "out").ok()
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "fresh"))
    model = exported.load(tmp_path / "out")
    said = model.label(["we are glad", "so sad"], dialogue=True)
    assert said == model.label(["we are glad", "so sad"], dialogue=True)
    assert not (tmp_path / "fresh").exists()


def test_a_resumed_run_equals_the_uninterrupted_one(below, tmp_path):
    named = (f"method.encoder_run={below}", *NETWORK)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train("friends/roberta_cnn_lstm", whole, *named).ok()
    with interrupted():
        train("friends/roberta_cnn_lstm", broken, *named).refused("--resume", code=130)
    call("train", broken / "recipe.yaml", "-o", broken, "--resume").ok()
    said = []
    for run in (whole, broken):
        call("predict", run, "--split", "test").ok()
        lines = (run / "test.predictions.jsonl").read_text().splitlines()[1:]
        said.append([json.loads(line)["probabilities"] for line in lines])
    assert said[0] == said[1]


def test_an_encoder_of_fewer_training_rows_is_no_encoder_of_other_rows(tmp_path):
    (tmp_path / "encoder").mkdir()
    tiny = save(tmp_path / "encoder")
    fewer = (f"method.name={tiny}", "method.head={max_length: 12, dropout: 0.0}", "train.epochs=1",
             "data.limit={train: 4}")  # fmt: skip
    train("friends/encoder", tmp_path / "below", *fewer).ok()
    named = (f"method.encoder_run={tmp_path / 'below'}", *NETWORK, "train.epochs=1")
    train("friends/roberta_cnn_lstm", tmp_path / "run", *named).ok()


def test_the_second_run_finds_the_features_of_the_first(below, tmp_path):
    for count in range(2):
        run = tmp_path / f"run-{count}"
        train("friends/roberta_cnn_lstm", run, f"method.encoder_run={below}", *NETWORK).ok()
        training = json.loads((run / "environment.json").read_text())["training"]
        for split in ("train", "dev"):
            assert training["splits"][split]["features_cached"] is (count == 1)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("friends/roberta_cnn_lstm", ("data.protocol=friends4",), "another protocol"),
        ("friends/roberta_cnn_lstm", ("seed=1",), "another seed"),
        ("mastodon/roberta_cnn_lstm", (), "another protocol"),
    ],
)
def test_an_encoder_of_other_rows_or_classes_is_refused(below, recipe, changes, message, tmp_path):
    named = (f"method.encoder_run={below}", *NETWORK, *changes)
    train(recipe, tmp_path / "run", *named).refused(str(below), message)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_not_finished_absent_or_of_another_method_is_refused(below, tmp_path):
    other = tmp_path / "encoder"
    shutil.copytree(below, other)
    shutil.rmtree(other / "adapter")
    named = (f"method.encoder_run={other}", *NETWORK)
    train("friends/roberta_cnn_lstm", tmp_path / "run", *named).refused("has not finished")
    shutil.rmtree(other)
    train("friends/roberta_cnn_lstm", tmp_path / "run", *named).refused("train it first")
    call("train", "friends/majority", "-o", other, "--data-root", FIXTURES).ok()
    train("friends/roberta_cnn_lstm", tmp_path / "run", *named).refused(
        "is a run of method majority; expected encoder"
    )
