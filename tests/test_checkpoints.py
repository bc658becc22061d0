import json
import random

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR

from llm_emo import checkpoints
from llm_emo.errors import AdapterError, RunError
from llm_emo.methods import trainable_state

methods = pytest.mark.parametrize("method", tiny.METHODS)


def made(folder, *steps, complete=True):
    for step in steps:
        path = folder / f"checkpoint-{step}"
        path.mkdir(parents=True)
        if complete:
            (path / checkpoints.STATE).write_text("{}")
    return folder


# --- which one -------------------------------------------------------------------------------


def test_the_newest_checkpoint_has_the_highest_step_not_the_last_name(tmp_path):
    made(tmp_path, 9, 100, 20)
    assert checkpoints.newest(tmp_path).name == "checkpoint-100"


def test_what_is_not_complete_is_not_a_checkpoint(tmp_path):
    made(tmp_path, 3)
    made(tmp_path, 6, complete=False)
    partial = tmp_path / ".checkpoint-9.partial"
    partial.mkdir()
    (partial / checkpoints.STATE).write_text("{}")
    (tmp_path / "checkpoint-notes.txt").write_text("mine")
    (tmp_path / "checkpoint-12").write_text("a file")
    assert checkpoints.newest(tmp_path).name == "checkpoint-3"


def test_a_folder_without_checkpoints_has_no_newest(tmp_path):
    assert checkpoints.newest(tmp_path) is None
    assert checkpoints.newest(tmp_path / "absent") is None


# --- the parameters --------------------------------------------------------------------------


@methods
def test_parameters_come_back_exactly(method, tmp_path):
    saved, other = tiny.adapted("llama", method), tiny.adapted("llama", method, seed=4)
    checkpoints.save_model(tmp_path, saved)
    checkpoints.load_model(tmp_path, other)
    state = trainable_state(saved)
    assert state.keys() == trainable_state(other).keys()
    assert all(torch.equal(t, trainable_state(other)[name]) for name, t in state.items())


@methods
def test_only_what_learns_is_written(method, tmp_path):
    model = tiny.adapted("llama", method)
    checkpoints.save_model(tmp_path, model)
    held = sum(tensor.numel() for tensor in load_file(tmp_path / "trainable.safetensors").values())
    assert held == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_missing_tensor_is_not_left_as_it_was(tmp_path):
    model = tiny.adapted("llama", "lora")
    checkpoints.save_model(tmp_path, model)
    path = tmp_path / "trainable.safetensors"
    state = load_file(path)
    name = sorted(state)[0]
    save_file({key: tensor for key, tensor in state.items() if key != name}, path)
    with pytest.raises(AdapterError, match=f"missing {name}"):
        checkpoints.load_model(tmp_path, model)


def test_a_checkpoint_without_parameters_is_an_error_that_says_what_to_remove(tmp_path):
    with pytest.raises(RunError, match="remove"):
        checkpoints.load_model(tmp_path, tiny.adapted("llama", "lora"))


# --- the optimiser ---------------------------------------------------------------------------


def stepped(model, steps):
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 0.1},
            {"params": [], "weight_decay": 0.0},
        ],
        lr=0.1,
        betas=(0.8, 0.95),
    )
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(steps):
        advance(model, optimizer, schedule)
    return optimizer, schedule


def advance(model, optimizer, schedule):
    optimizer.zero_grad()
    sum((p**2).sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()
    schedule.step()


@methods
def test_an_optimiser_goes_on_as_if_nothing_had_happened(method, tmp_path):
    straight = tiny.adapted("llama", method)
    advance(straight, *stepped(straight, 3))

    model = tiny.adapted("llama", method)
    optimizer, schedule = stepped(model, 3)
    checkpoints.save_model(tmp_path, model)
    checkpoints.save_optimizer(tmp_path, optimizer, schedule)

    resumed = tiny.adapted("llama", method, seed=7)
    optimizer, schedule = stepped(resumed, 0)
    checkpoints.load_model(tmp_path, resumed)
    checkpoints.load_optimizer(tmp_path, optimizer, schedule)
    advance(resumed, optimizer, schedule)
    for name, tensor in trainable_state(straight).items():
        assert torch.equal(tensor, trainable_state(resumed)[name])
    assert schedule.get_last_lr() == pytest.approx([0.1 / 5, 0.1 / 5])


def test_an_optimiser_that_has_not_stepped_comes_back_empty(tmp_path):
    model = tiny.adapted("llama", "lora")
    checkpoints.save_optimizer(tmp_path, *stepped(model, 0))
    optimizer, schedule = stepped(model, 2)
    checkpoints.load_optimizer(tmp_path, optimizer, schedule)
    assert optimizer.state_dict()["state"] == {}


# --- random numbers --------------------------------------------------------------------------


def draw():
    return (
        random.random(),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(2).tolist(),
    )


def test_random_numbers_go_on_where_they_were(tmp_path):
    np.random.randn()  # leaves a second Gaussian in store, which is part of the state
    checkpoints.save_rng(tmp_path, 0)
    expected = draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert draw() != expected
    checkpoints.load_rng(tmp_path, 0)
    assert draw() == expected


def test_every_process_has_its_own_random_numbers(tmp_path):
    torch.manual_seed(1)
    checkpoints.save_rng(tmp_path, 0)
    first = torch.rand(1)
    torch.manual_seed(2)
    checkpoints.save_rng(tmp_path, 1)
    second = torch.rand(1)
    checkpoints.load_rng(tmp_path, 0)
    assert torch.equal(torch.rand(1), first)
    checkpoints.load_rng(tmp_path, 1)
    assert torch.equal(torch.rand(1), second)


def test_more_processes_than_the_checkpoint_has_are_an_error_that_says_so(tmp_path):
    checkpoints.save_rng(tmp_path, 0)
    with pytest.raises(RunError, match="as many processes"):
        checkpoints.load_rng(tmp_path, 1)


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    model = tiny.adapted("llama", "lora")
    checkpoints.save_model(tmp_path, model)
    checkpoints.save_optimizer(tmp_path, *stepped(model, 2))
    checkpoints.save_rng(tmp_path, 0)
    for path in tmp_path.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            load_file(path)
