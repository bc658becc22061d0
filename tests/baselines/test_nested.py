"""Runs inside the runs that are built on them: complete wherever they are saved, and how often."""

import shutil

import pytest
import test_encoder_task
import test_roberta_cnn_lstm_task
import torch
from safetensors.torch import load_file, save_file
from test_encoder_task import EXPERIMENT, NAMES, ROWS

from llm_emo.baselines import fusion_task, nested, roberta_cnn_lstm_task
from llm_emo.baselines.encoder import width
from llm_emo.baselines.fusion import Fusion
from llm_emo.baselines.kinds import Fusion as FusionMethod
from llm_emo.errors import ModelError
from llm_emo.runs import folder_sum

METHODS = {
    "fusion": FusionMethod(
        kind="fusion", text_run="runs/encoder", network={"hidden": [8, 8, 8], "dropout": 0.0}
    ),
    "roberta_cnn_lstm": test_roberta_cnn_lstm_task.method(),
}
TASKS = {"fusion": fusion_task, "roberta_cnn_lstm": roberta_cnn_lstm_task}
INSIDE = {"fusion": fusion_task.TEXT, "roberta_cnn_lstm": roberta_cnn_lstm_task.ENCODER}
each_kind = pytest.mark.parametrize("kind", TASKS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def below(tmp_path):
    """A finished encoder run."""
    encoder = test_encoder_task.made(tmp_path)
    source = tmp_path / "below" / "adapter"
    source.mkdir(parents=True)
    encoder.save(source)
    return nested.Nested(source, encoder.method, encoder, folder_sum(source))


def built(kind, below):
    """Return a network of a kind over a finished run."""
    torch.manual_seed(0)
    features = width(below.classifier.model)
    if kind == "fusion":
        network = Fusion(METHODS[kind].network, features + len(NAMES), len(NAMES))
        return fusion_task.FusionClassifier(NAMES, METHODS[kind], network, {"text": below})
    network = roberta_cnn_lstm_task._network(METHODS[kind], below.classifier)
    return roberta_cnn_lstm_task.DialogueClassifier(NAMES, network, below)


def saved(classifier, folder):
    folder.mkdir(exist_ok=True)
    classifier.save(folder)
    return folder


def loaded(kind, folder):
    return TASKS[kind].load(METHODS[kind], EXPERIMENT, folder)


def said(classifier):
    return dict(classifier.probabilities(ROWS, "test"))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@each_kind
def test_what_was_loaded_is_saved_whole_and_stands_alone(kind, below, tmp_path):
    made = built(kind, below)
    expected = said(made)
    first = saved(made, tmp_path / "first")
    second = saved(loaded(kind, first), tmp_path / "second")
    assert files(second) == files(first)
    for gone in (first, below.source, tmp_path / "encoder"):
        shutil.rmtree(gone)
    assert said(loaded(kind, second)) == expected


@each_kind
def test_saving_where_it_was_loaded_from_loses_nothing(kind, below, tmp_path):
    made = built(kind, below)
    folder = saved(made, tmp_path / "run")
    before = files(folder)
    loaded(kind, folder).save(folder)
    assert files(folder) == before
    assert said(loaded(kind, folder)) == said(made)


@each_kind
def test_a_run_that_goes_while_another_is_trained_on_it_is_saved_all_the_same(
    kind, below, tmp_path
):
    made = built(kind, below)
    shutil.rmtree(below.source)
    folder = saved(made, tmp_path / "run")
    assert said(loaded(kind, folder)) == said(made)


@each_kind
def test_a_run_that_is_trained_anew_meanwhile_is_saved_as_it_was_when_it_was_read(
    kind, below, tmp_path
):
    made = built(kind, below)
    expected = said(made)
    [weights] = below.source.glob("*.safetensors")
    other = {name: value + 0.5 for name, value in load_file(weights).items()}
    weights.unlink()
    save_file(other, weights)
    folder = saved(made, tmp_path / "run")
    assert said(loaded(kind, folder)) == expected


@each_kind
def test_a_run_that_lost_the_one_inside_it_is_damaged(kind, below, tmp_path):
    folder = saved(built(kind, below), tmp_path / "run")
    (folder / INSIDE[kind] / nested.METHOD).unlink()
    with pytest.raises(ModelError, match=r"method\.json: cannot be read"):
        loaded(kind, folder)
