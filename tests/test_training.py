import gc
import itertools
import json
import math
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback, TrainingArguments

from llm_emo import checkpoints, decoder_layer, training
from llm_emo.encoding import Encoded
from llm_emo.errors import JobFailed
from llm_emo.methods import adapt, trainable_state, untrained
from llm_emo.steps import Steps
from llm_emo.training import (
    EmoTrainer,
    EvaluateAndSave,
    answer_loss,
    collate,
    stopping,
    training_arguments,
)

architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
methods = pytest.mark.parametrize("method", tiny.METHODS)

ROWS = tiny.encoded(10)


class Interrupted(Exception):
    """Stands for a lost machine."""


class InterruptAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


def rising(start=1):
    """A validation whose metric always improves, so that the last state is the best."""
    values = itertools.count(start)
    return lambda model: {"f1": float(next(values))}


def train(
    folder, model, section, *,
    rows=ROWS, dialogues=None, validate=None, resume=False, stop_at=None, seed=3,
):  # fmt: skip
    """Train as the program does, in this process; return the trainer."""
    steps = Steps(rows, section, seed=seed, dialogues=dialogues)
    trainer = EmoTrainer(
        model,
        training_arguments(folder, section, seed=seed, metric="f1"),
        rows=rows,
        steps=steps,
        validate=validate or rising(),
        callbacks=[
            EvaluateAndSave(len(steps), section.evaluations_per_epoch),
            *stopping(section),
            *([InterruptAt(stop_at)] if stop_at is not None else []),
        ],
    )
    checkpoint = checkpoints.newest(folder) if resume else None
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Interrupted:
        assert stop_at is not None
    return trainer


def learned(model):
    return torch.cat([tensor.flatten() for tensor in trainable_state(model).values()])


def trail(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def counted(trainer):
    return {name: count for name, count in trainer.totals.items() if name != "seconds"}


def padded_loss(model, rows):
    """The mean loss that transformers computes on a padded batch with masked labels."""
    ids = [torch.tensor(row.prompt + row.answer) for row in rows]
    labels = [torch.tensor([-100] * len(row.prompt) + list(row.answer)) for row in rows]
    return model(
        input_ids=pad_sequence(ids, batch_first=True, padding_value=0),
        attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        labels=pad_sequence(labels, batch_first=True, padding_value=-100),
    ).loss


@pytest.mark.parametrize("stop_at", [None, 1])
def test_what_a_training_does_to_a_model_ends_with_it(tmp_path, stop_at):
    model = tiny.adapted("llama", "lora")
    known = [layer.forward.keywords["known"] for layer in decoder_layer.written_out(model)]
    inside = []

    def validate(model):
        inside.append(("zero_grad" in vars(model), all(one.kept for one in known)))
        return {"f1": float(len(inside))}

    section = tiny.train(epochs=1, batch_size=2, evaluations_per_epoch=2)
    trainer = train(tmp_path, model, section, validate=validate, stop_at=stop_at)
    assert (len(inside) > 0) == (stop_at is None)
    assert all(seen == (True, True) for seen in inside)
    assert "zero_grad" not in vars(model)
    assert not any(one.kept or one.groups for one in known)
    assert gc.get_freeze_count() == 0
    if stop_at is None:
        assert all(part.grad is None for part in trainer.learning)


# --- the loss ----------------------------------------------------------------------------------

random_rows = st.lists(
    st.tuples(
        st.lists(st.sampled_from([3, 50, 200]), min_size=1, max_size=8).map(tuple),
        st.lists(st.sampled_from([30, 31]), max_size=3).map(lambda ids: (*ids, 2)),
    ).map(lambda pair: Encoded("row", *pair)),
    min_size=1,
    max_size=6,
)


@architectures
@given(rows=random_rows)
@settings(max_examples=15, deadline=None)
def test_the_loss_is_that_of_a_padded_batch(architecture, rows):
    model = tiny.model(architecture)
    tokens = sum(len(row.answer) for row in rows)
    with torch.no_grad():
        mean = answer_loss(model, collate(rows)) / tokens
        assert float(mean) == pytest.approx(float(padded_loss(model, rows)), rel=1e-5)


@architectures
@methods
def test_the_loss_of_an_adapted_model_is_that_of_a_padded_batch(architecture, method):
    model = tiny.adapted(architecture, method)
    tokens = sum(len(row.answer) for row in ROWS)
    with torch.no_grad():
        mean = answer_loss(model, collate(ROWS)) / tokens
        assert float(mean) == pytest.approx(float(padded_loss(model, ROWS)), rel=1e-5)


def test_a_row_that_stands_twice_counts_twice():
    model, row = tiny.model(), ROWS[0]
    with torch.no_grad():
        once, twice = (answer_loss(model, collate([row] * n)) for n in (1, 2))
    assert float(twice) == pytest.approx(2 * float(once), rel=1e-6)
    assert len(collate([row] * 2)["trie"]) == len(collate([row])["trie"])


@given(rows=random_rows)
@settings(max_examples=50, deadline=None)
def test_every_answer_token_is_a_target_and_no_prompt_token_is(rows):
    batch = collate(rows)
    path = {}  # node -> the tokens up to it
    for row, nodes in zip(rows, batch["trie"].nodes.tolist(), strict=True):
        sequence = row.prompt + row.answer[:-1]
        path |= {node: sequence[: i + 1] for i, node in enumerate(nodes[: len(sequence)])}
    found = Counter(
        (path[int(batch["nodes"][at])], int(token))
        for at, token in zip(batch["where"], batch["labels"], strict=True)
    )
    assert found == Counter(
        (row.prompt + row.answer[:i], token) for row in rows for i, token in enumerate(row.answer)
    )


def test_the_first_logged_loss_is_the_mean_over_the_batch_s_answer_tokens(tmp_path):
    model = tiny.adapted("llama", "lora")
    with torch.no_grad():
        expected = float(padded_loss(model, ROWS[:4]))
    section = tiny.train(batch_size=4, micro_batch_size=1)
    assert trail(train(tmp_path, model, section, rows=ROWS[:4])) == pytest.approx(
        [expected], rel=1e-5
    )


def test_an_empty_pass_adds_nothing_but_is_part_of_the_graph():
    model = tiny.adapted("llama", "lora").train()
    loss = answer_loss(model, collate([]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert tiny.gradients(model).abs().max() == 0


@pytest.mark.parametrize("rows", [[], [Encoded("mute", (3, 4), ())]])
def test_nothing_to_learn_from_is_an_error(rows, tmp_path):
    with pytest.raises(JobFailed, match=r"no training rows|no answer tokens"):
        train(tmp_path, tiny.adapted("llama", "lora"), tiny.train(), rows=rows or [])


# --- one batch, however it is cut --------------------------------------------------------------


@methods
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 3},
        {"micro_batch_size": 5},
        {"tokens_per_pass": 1},
        {"tokens_per_pass": 25},
        {"micro_batch_size": 3, "tokens_per_pass": 25},
    ],
)
def test_passes_do_not_change_training(method, changes, tmp_path):
    # Ten rows of unequal answers in steps of ten: three epochs are three optimiser steps.
    section = tiny.train(epochs=3, batch_size=10, micro_batch_size=10)
    whole = train(tmp_path / "whole", tiny.adapted("llama", method), section)
    cut = train(
        tmp_path / "cut",
        tiny.adapted("llama", method),
        section.model_copy(update=changes),
    )
    assert len(next(iter(whole.steps))) == 1 < len(next(iter(cut.steps)))
    assert cut.state.global_step == whole.state.global_step == 3
    assert tiny.distance(learned(cut.model), learned(whole.model)) < 1e-5
    assert trail(cut) == pytest.approx(trail(whole), rel=1e-5)
    assert trail(cut, "grad_norm") == pytest.approx(trail(whole, "grad_norm"), rel=1e-4)


@methods
def test_a_short_last_step_weighs_its_own_tokens(method, tmp_path):
    # Ten rows in steps of four: the third step has two rows, in one or two micro-batches.
    section = tiny.train(epochs=2, batch_size=4, micro_batch_size=4)
    whole = train(tmp_path / "whole", tiny.adapted("llama", method), section)
    cut = train(
        tmp_path / "cut",
        tiny.adapted("llama", method),
        section.model_copy(update={"micro_batch_size": 1}),
    )
    assert cut.state.global_step == whole.state.global_step == 6
    assert tiny.distance(learned(cut.model), learned(whole.model)) < 1e-5


@methods
def test_gradients_of_all_passes_are_those_of_the_whole_step(method, tmp_path):
    passes = [ROWS[:1], ROWS[1:7], ROWS[7:]]
    found = []
    for step in ([ROWS], passes):
        made = tiny.adapted("llama", method)
        trainer = EmoTrainer(
            made,
            training_arguments(tmp_path, tiny.train(), seed=0, metric="f1"),
            rows=ROWS,
            steps=[[[0]]],
            validate=rising(),
            callbacks=[],
        )
        batches = [collate(rows) for rows in step]
        tokens = trainer._get_num_items_in_batch([batches], torch.device("cpu"))
        assert int(tokens) == sum(len(row.answer) for row in ROWS)
        loss = trainer.training_step(made, batches, tokens)
        found.append((float(loss), tiny.gradients(made)))
    (whole, gradients), (cut, others) = found
    assert cut == pytest.approx(whole, rel=1e-6)
    assert tiny.distance(others, gradients) < 1e-5
    with torch.no_grad():
        assert whole == pytest.approx(float(padded_loss(made, ROWS)), rel=1e-5)


def test_several_visible_gpus_leave_the_model_whole_and_one_line_says_so(
    tmp_path, monkeypatch, capsys
):
    class TwoVisible(TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    monkeypatch.setattr(training, "TrainingArguments", TwoVisible)
    trainer = train(tmp_path, tiny.adapted("llama", "lora"), tiny.train())
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)
    assert trainer.state.global_step == 3
    told = [line for line in capsys.readouterr().err.splitlines() if "GPUs" in line]
    assert len(told) == 1
    assert told[0].startswith("2 GPUs are visible")
    assert "accelerate launch --num_processes 2 -m llm_emo train" in told[0]


@methods
def test_gradient_checkpointing_does_not_change_training(method, tmp_path):
    section = tiny.train(epochs=1)
    plain = train(tmp_path / "a", tiny.adapted("gemma3", method), section)
    saving = train(
        tmp_path / "b",
        tiny.adapted("gemma3", method),
        section.model_copy(update={"gradient_checkpointing": True}),
    )
    decoder = saving.model.base if method == "p_tuning_v2" else saving.model.get_base_model()
    assert all(layer.gradient_checkpointing for layer in decoder.model.layers)
    assert tiny.distance(learned(saving.model), learned(plain.model)) < 1e-6


def test_training_is_repeatable(tmp_path):
    runs = [
        train(tmp_path / name, tiny.adapted("llama", "lora", dropout=0.3), tiny.train(epochs=2))
        for name in "ab"
    ]
    assert torch.equal(learned(runs[0].model), learned(runs[1].model))
    assert trail(runs[0]) == trail(runs[1])


# --- what is learned and logged ----------------------------------------------------------------


@architectures
@methods
def test_training_lowers_the_loss_and_leaves_no_layer_untrained(architecture, method, tmp_path):
    base = tiny.model(architecture)
    model = adapt(base, tiny.lora() if method == "lora" else tiny.p_tuning())
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    section = tiny.train(
        epochs=25, batch_size=10, micro_batch_size=10, learning_rate=0.1, schedule="constant"
    )
    losses = trail(train(tmp_path, model, section))
    assert losses[-1] < 0.8 * losses[0]
    assert untrained(model) == []
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_the_loss_is_logged_at_every_step(tmp_path):
    trainer = train(tmp_path, tiny.adapted("llama", "lora"), tiny.train(epochs=2))
    steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(loss) for loss in trail(trainer))


def test_tokens_run_and_saved_add_up(tmp_path):
    trainer = train(tmp_path, tiny.adapted("llama", "lora"), tiny.train(epochs=2))
    tokens = 2 * sum(len(row.prompt) + len(row.answer) - 1 for row in ROWS)
    counts = trainer.counts()
    assert counts["tokens_run"] + counts["tokens_saved"] == tokens
    assert counts["tokens_saved"] >= 2 * 3 * (10 - 3)  # three shared tokens, three steps an epoch
    assert trainer.totals["examples"] == 20


def test_no_division_by_zero_hides_a_loss_that_is_not_a_number(tmp_path):
    model = tiny.adapted("llama", "lora")
    with torch.no_grad():
        model.get_base_model().lm_head.weight[7] = float("nan")
    assert all(math.isnan(loss) for loss in trail(train(tmp_path, model, tiny.train())))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_the_learning_rate_follows_warm_up_and_schedule(schedule, warmup, tmp_path):
    # Four epochs of ten rows in fives: eight steps, of which a quarter warms up.
    section = tiny.train(
        epochs=4,
        batch_size=5,
        micro_batch_size=5,
        schedule=schedule,
        warmup_ratio=warmup,
        learning_rate=0.5,
    )
    trainer = train(tmp_path, tiny.adapted("llama", "p_tuning_v2"), section)
    total, rise = 8, round(8 * warmup)

    def rate(step):
        if step < rise:
            return step / rise
        done = (step - rise) / (total - rise)
        after = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1}
        return after[schedule]

    assert trail(trainer, "learning_rate") == pytest.approx([0.5 * rate(s) for s in range(8)])


# --- choosing the best state -------------------------------------------------------------------


def scripted(*values):
    """A validation with given results, which keeps what the model was at each."""
    results, states = iter(values), []

    def validate(model):
        states.append(learned(model).clone())
        return {"f1": next(results), "loss_like": -1.0}

    return validate, states


@methods
def test_the_best_state_on_dev_is_the_one_at_the_end(method, tmp_path):
    validate, states = scripted(0.3, 0.9, 0.5, 0.6)
    section = tiny.train(epochs=4)
    trainer = train(tmp_path, tiny.adapted("llama", method), section, validate=validate)
    assert len(states) == 4
    assert trainer.kept() == ("f1", 6, 0.9)
    assert torch.equal(learned(trainer.model), states[1])
    assert not torch.equal(states[1], states[3])


def test_of_equal_states_the_earliest_is_kept(tmp_path):
    validate, states = scripted(0.5, 0.5, 0.5)
    trainer = train(
        tmp_path, tiny.adapted("llama", "lora"), tiny.train(epochs=3), validate=validate
    )
    assert torch.equal(learned(trainer.model), states[0])


def test_a_run_can_keep_its_last_state(tmp_path):
    section = tiny.train(epochs=3, keep="last")
    validate, states = scripted(0.5, 0.9, 0.4)
    straight = train(tmp_path / "a", tiny.adapted("llama", "lora"), section, validate=validate)
    assert torch.equal(learned(straight.model), states[2])
    assert not torch.equal(states[1], states[2])
    assert straight.kept() == ("f1", 9, 0.4)
    first, _ = scripted(0.5, 0.9)
    train(tmp_path / "b", tiny.adapted("llama", "lora"), section, validate=first, stop_at=7)
    second, _ = scripted(0.4)
    resumed = train(
        tmp_path / "b", tiny.adapted("llama", "lora"), section, validate=second, resume=True
    )
    assert torch.equal(learned(resumed.model), states[2])
    assert resumed.kept() == ("f1", 9, 0.4)


def test_training_stops_when_dev_no_longer_improves(tmp_path):
    validate, states = scripted(0.3, 0.5, 0.4, 0.5, 0.9)
    section = tiny.train(epochs=5, early_stopping_patience=2)
    trainer = train(tmp_path, tiny.adapted("llama", "lora"), section, validate=validate)
    assert len(states) == 4
    assert trainer.state.global_step == 12
    assert torch.equal(learned(trainer.model), states[1])


def test_patience_is_not_renewed_by_a_resume(tmp_path):
    section = tiny.train(epochs=6, early_stopping_patience=2)
    validate, _ = scripted(0.5, 0.4, 0.3)
    first = {"validate": validate, "stop_at": 6}  # interrupted after the evaluation that gave 0.4
    train(tmp_path, tiny.adapted("llama", "lora"), section, **first)
    second, states = scripted(0.3, 0.2, 0.1, 0.0)
    trainer = train(tmp_path, tiny.adapted("llama", "lora"), section, validate=second, resume=True)
    assert len(states) == 1
    assert trainer.state.global_step == 9
    assert trainer.state.best_global_step == 3


@pytest.mark.parametrize(
    ("steps", "wanted", "at"),
    [(6, 1, [6, 12]), (6, 2, [3, 6, 9, 12]), (5, 2, [3, 5, 8, 10]), (2, 9, [1, 2, 3, 4])],
)
def test_evaluations_are_evenly_spaced_and_the_last_ends_the_epoch(steps, wanted, at):
    callback = EvaluateAndSave(steps, wanted)
    asked = []
    for step in range(1, 2 * steps + 1):
        control = SimpleNamespace(should_evaluate=False, should_save=False)
        callback.on_step_end(None, SimpleNamespace(global_step=step), control)
        assert control.should_evaluate == control.should_save
        asked += [step] if control.should_save else []
    assert asked == at


def test_evaluation_does_not_change_training(tmp_path):
    # It may leave the model in eval mode, or draw random numbers it should not.
    def disturbing(model):
        model.eval()
        return {"f1": 1.0}

    runs = [
        train(
            tmp_path / str(times),
            tiny.adapted("llama", "lora", dropout=0.3),
            tiny.train(epochs=2, evaluations_per_epoch=times),
            validate=disturbing,
        )
        for times in (1, 3)
    ]
    assert trail(runs[0]) == trail(runs[1])


def test_passes_come_to_the_device(tmp_path, monkeypatch):
    # A specialised model's batches are made on the CPU, and its scores take them as they come.
    brought, lost = [], []
    compute = EmoTrainer.compute_loss

    def bring(self, batch):
        brought.append(dict(batch))
        return brought[-1]

    def recorded(self, model, batch, *args, **kwargs):
        lost.append(batch)
        return compute(self, model, batch, *args, **kwargs)

    monkeypatch.setattr(EmoTrainer, "_prepare_inputs", bring)
    monkeypatch.setattr(EmoTrainer, "compute_loss", recorded)
    train(tmp_path, tiny.adapted("llama", "lora"), tiny.train(epochs=1, micro_batch_size=1))
    assert len(brought) == len(lost) > 0
    assert all(one is other for one, other in zip(brought, lost, strict=True))


def test_all_modules_train_in_every_step(tmp_path, monkeypatch):
    # What comes from files is in eval mode, and evaluation puts everything into it.
    made, modes = tiny.adapted("llama", "lora"), []
    made.get_base_model().eval()
    compute = EmoTrainer.compute_loss

    def recorded(self, model, *args, **kwargs):
        modes.append({module.training for module in model.modules()})
        return compute(self, model, *args, **kwargs)

    monkeypatch.setattr(EmoTrainer, "compute_loss", recorded)

    def validate(model):
        model.eval()
        return {"f1": 1.0}

    train(tmp_path, made, tiny.train(epochs=2, evaluations_per_epoch=2), validate=validate)
    assert len(modes) > 2
    assert all(mode == {True} for mode in modes)


# --- resuming ----------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("stop_at", [2, 3, 4, 5, 7])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(method, stop_at, tmp_path):
    # Three steps an epoch, a checkpoint after the second and the third: interrupted in the first
    # epoch, between epochs, in the middle of later ones, with and without steps to do again.
    changes = {"dropout": 0.3}
    section = tiny.train(epochs=3, evaluations_per_epoch=2, micro_batch_size=2, schedule="cosine")
    straight = train(tmp_path / "a", tiny.adapted("llama", method, **changes), section)
    train(tmp_path / "b", tiny.adapted("llama", method, **changes), section, stop_at=stop_at)
    state = json.loads((checkpoints.newest(tmp_path / "b") / checkpoints.STATE).read_text())
    seconds = state["stateful_callbacks"]["counts"]["seconds"]
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    resumed = train(
        tmp_path / "b",
        tiny.adapted("llama", method, seed=5, **changes),
        section,
        resume=True,
        validate=rising(10),
    )
    assert resumed.state.global_step == straight.state.global_step == 9
    assert trail(resumed) == trail(straight)
    assert trail(resumed, "learning_rate") == trail(straight, "learning_rate")
    assert counted(resumed) == counted(straight)
    assert resumed.totals["seconds"] > seconds > 0
    assert torch.equal(learned(resumed.model), learned(straight.model))


def test_the_best_state_from_before_an_interruption_is_still_the_best(tmp_path):
    section = tiny.train(epochs=4)
    validate, states = scripted(0.9, 0.5)
    model = tiny.adapted("llama", "lora")
    train(tmp_path / "old", model, section, validate=validate, stop_at=6)
    (tmp_path / "old").rename(tmp_path / "new")  # the run folder may move meanwhile
    resumed = train(
        tmp_path / "new",
        tiny.adapted("llama", "lora"),
        section,
        validate=lambda model: {"f1": 0.6},
        resume=True,
    )
    assert resumed.state.best_metric == 0.9
    assert torch.equal(learned(resumed.model), states[0])


def test_a_run_that_had_stopped_early_is_resumed_without_another_step(tmp_path):
    section = tiny.train(epochs=6, early_stopping_patience=1)
    validate, states = scripted(0.5, 0.4)
    train(tmp_path, tiny.adapted("llama", "lora"), section, validate=validate)
    better, _ = scripted(0.9)
    again = train(tmp_path, tiny.adapted("llama", "lora"), section, validate=better, resume=True)
    assert again.state.global_step == 6
    assert torch.equal(learned(again.model), states[0])


def test_a_finished_run_is_resumed_without_another_step(tmp_path):
    section = tiny.train(epochs=2)
    first = train(tmp_path, tiny.adapted("llama", "lora"), section)
    again = train(tmp_path, tiny.adapted("llama", "lora", seed=5), section, resume=True)
    assert again.state.global_step == first.state.global_step
    assert torch.equal(learned(again.model), learned(first.model))


@pytest.mark.parametrize("stop_at", [2, 4, 5])
def test_a_run_of_dialogues_and_token_budgets_is_resumed_to_the_same_end(stop_at, tmp_path):
    section = tiny.train(
        epochs=3, evaluations_per_epoch=2, batch_by="dialogue", tokens_per_pass=15
    )  # fmt: skip
    shape = {"dialogues": [[0, 1, 2], [3, 4, 5, 6, 7], [8, 9]]}
    changes = {"dropout": 0.3}
    straight = train(tmp_path / "a", tiny.adapted("llama", "lora", **changes), section, **shape)
    assert {len(step) for step in straight.steps} > {1}, "steps differ in their passes"
    train(tmp_path / "b", tiny.adapted("llama", "lora", **changes), section, **shape,
          stop_at=stop_at)  # fmt: skip
    torch.manual_seed(99)
    resumed = train(
        tmp_path / "b", tiny.adapted("llama", "lora", seed=5, **changes), section, **shape,
        resume=True, validate=rising(10),
    )  # fmt: skip
    assert resumed.state.global_step == straight.state.global_step == 9
    assert trail(resumed) == trail(straight)
    assert counted(resumed) == counted(straight)
    assert torch.equal(learned(resumed.model), learned(straight.model))


# --- checkpoints on disk -----------------------------------------------------------------------


def test_a_run_keeps_its_newest_and_its_best_checkpoint_and_no_pickle(tmp_path):
    validate, _ = scripted(0.3, 0.9, 0.5, 0.6)
    train(tmp_path, tiny.adapted("llama", "lora"), tiny.train(epochs=4), validate=validate)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-6"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_a_checkpoint_cut_off_while_written_is_never_chosen(tmp_path, monkeypatch):
    section = tiny.train(epochs=3)
    whole = checkpoints.save_optimizer

    def failing(folder, optimizer, scheduler):
        if folder.name == ".checkpoint-6.partial":
            raise Interrupted
        whole(folder, optimizer, scheduler)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_optimizer", failing)
        train(tmp_path, tiny.adapted("llama", "lora"), section, stop_at=99)
    assert (tmp_path / ".checkpoint-6.partial" / "trainable.safetensors").exists()
    assert checkpoints.newest(tmp_path).name == "checkpoint-3"
    resumed = train(tmp_path, tiny.adapted("llama", "lora", seed=5), section, resume=True)
    assert resumed.state.global_step == 9
    straight = train(tmp_path / "straight", tiny.adapted("llama", "lora"), section)
    assert trail(resumed) == trail(straight)


# --- processes ---------------------------------------------------------------------------------

SCRIPT = """
import json, math, os, sys
from pathlib import Path
import tiny
from test_training import EmoTrainer, Steps, EvaluateAndSave, training_arguments, rising
from llm_emo.methods import trainable_state

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
out = Path(sys.argv[1])
result = {}
passes = []
for method, by in zip(tiny.METHODS, ("row", "dialogue")):
    # Nine rows in fours: the last step has one row, and a process has none there. The budget
    # gives processes other numbers of passes in a step.
    rows = tiny.encoded(9)
    section = tiny.train(
        epochs=2, batch_size=4, micro_batch_size=1 if by == "row" else 4, batch_by=by,
        tokens_per_pass=None if by == "row" else 12,
    )
    groups = None if by == "row" else [[0, 1, 2, 3, 4], [5, 6], [7, 8]]
    steps = Steps(rows, section, seed=3, dialogues=groups, rank=rank, world=world)
    passes.append([len(step) for step in steps])
    trainer = EmoTrainer(
        tiny.adapted("llama", method),
        training_arguments(out / method, section, seed=3, metric="f1"),
        rows=rows, steps=steps, validate=rising(), callbacks=[EvaluateAndSave(3, 1)],
    )
    assert trainer.args.world_size == world == int(sys.argv[2])
    trainer.train()
    result[method] = {
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "sum": [float(t.double().sum()) for t in trainable_state(trainer.model).values()],
        "tokens": trainer.totals["tokens_run"] + trainer.totals["tokens_saved"],
        "examples": trainer.totals["examples"],
        "files": sorted(p.name for p in (out / method / "checkpoint-6").iterdir()),
    }
(out / f"passes-{rank}.json").write_text(json.dumps(passes))
if rank == 0:
    (out / "result.json").write_text(json.dumps(result))
"""


def launch(folder, processes):
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # `accelerate launch --cpu --num_processes 2` starts one process unless MPI is there;
    # `--multi_gpu` starts two wherever there is a device for each, or none.
    # fmt: off
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", port, str(script), str(folder), "2",
    ] if processes == 2 else [sys.executable, str(script), str(folder), "1"]
    # fmt: on
    paths = os.pathsep.join([str(here), str(here.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_two_processes_leave_the_loss_trail_of_one(tmp_path):
    one, two = launch(tmp_path / "one", 1), launch(tmp_path / "two", 2)
    passes = [json.loads((tmp_path / "two" / f"passes-{rank}.json").read_text()) for rank in (0, 1)]
    assert passes[0][1] != passes[1][1], "processes have other numbers of passes in a step"
    for method in tiny.METHODS:
        assert len(one[method]["loss"]) == 6
        assert [two[method][key] for key in ("tokens", "examples")] == [
            one[method][key] for key in ("tokens", "examples")
        ]
        assert two[method]["loss"] == pytest.approx(one[method]["loss"], rel=1e-5)
        assert two[method]["sum"] == pytest.approx(one[method]["sum"], rel=1e-4, abs=1e-4)
        assert {"rng-0.json", "rng-1.json"} <= set(two[method]["files"])
