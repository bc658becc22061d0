"""The benchmark compares like with like; its timings are not tested."""

import importlib.util
import math
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch

from llm_emo.encoding import Encoded
from llm_emo.errors import JobFailed, RunError

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "train.py"
SPEC = importlib.util.spec_from_file_location("bench_train", SCRIPT)
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL is not installed (extra: bench)"
)
peers = pytest.mark.parametrize(
    "side",
    [
        pytest.param("trl", marks=needs_trl),
        pytest.param("trl_padding_free", marks=needs_trl),
        "padded",
    ],
)
ROWS = [*tiny.encoded(11), tiny.encoded(1)[0]]  # one row stands there twice


def trainer(side, folder, **changes):
    """The trainer of a side over the tiny model: three steps of four rows."""
    return bench.trainer_of(
        side,
        tiny.adapted("llama", "lora"),
        tiny.tokenizer(),
        ROWS,
        tiny.train(**changes),
        folder=folder,
        seed=1,
    )


def pairs_of(rows):
    return Counter(
        ((*row.prompt, *row.answer[:at]), token)
        for row in rows
        for at, token in enumerate(row.answer)
    )


@peers
def test_each_step_of_each_side_trains_the_same_tokens_after_the_same_tokens(side, tmp_path):
    ours = [bench.trained(batch) for batch in trainer("llm_emo", tmp_path).get_train_dataloader()]
    theirs = [bench.trained(batch) for batch in trainer(side, tmp_path).get_train_dataloader()]
    assert theirs == ours
    assert [pairs.total() for pairs in ours] != [0, 0, 0]
    assert sum(ours, Counter()) == pairs_of(ROWS)


@peers
def test_each_step_of_each_side_has_the_same_loss(side, tmp_path):
    _, ours = bench.timed(trainer("llm_emo", tmp_path / "a", schedule="cosine", warmup_ratio=0.4))
    _, theirs = bench.timed(trainer(side, tmp_path / "b", schedule="cosine", warmup_ratio=0.4))
    assert len(ours) == 3
    assert theirs == pytest.approx(ours, rel=1e-4)
    # The second step would have another loss if the first had not learned alike.
    still = bench.timed(trainer("llm_emo", tmp_path / "c", learning_rate=1e-9))[1]
    assert abs(still[-1] - ours[-1]) > 1e-2


@pytest.mark.parametrize("side", ["llm_emo", "padded", pytest.param("trl", marks=needs_trl)])
def test_the_checked_loss_is_that_of_the_first_step(side, tmp_path):
    made = trainer(side, tmp_path)
    batch = next(iter(made.get_train_dataloader()))
    checked = bench.loss_of(made, batch, bench.trained(batch).total())
    assert bench.timed(made)[1][0] == pytest.approx(checked, rel=1e-6)


def test_seconds_run_from_step_to_step(tmp_path):
    seconds, losses = bench.timed(trainer("llm_emo", tmp_path))
    assert len(seconds) == len(losses) - 1
    assert all(second > 0 for second in seconds)


def test_what_a_padded_batch_trains_is_read_from_its_labels():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, -100, 7, 8], [-100, 9, -100, -100]]),
    }
    assert bench.trained(batch) == {((5, 6), 7): 1, ((5, 6, 7), 8): 1, ((5,), 9): 1}
    assert bench.tokens_in(batch) == 8


def test_rows_are_drawn_by_the_seed_and_never_twice():
    first, again, other = (bench.chosen(range(100), 40, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 40
    with pytest.raises(RunError, match=r"101 rows are wanted, but train has 100"):
        bench.chosen(range(100), 101, 0)


def result(rate, *, trained="a"):
    return {"examples_per_second": rate, "trained": trained}


def test_a_ratio_is_taken_round_by_round():
    results = {"llm_emo": [result(8.0), result(4.0)], "trl": [result(1.0), result(1.0)]}
    assert bench.ratios(results) == {"trl": [8.0, 4.0]}


@pytest.mark.parametrize("loss", [1.00002, math.nan])
def test_sides_with_different_losses_are_not_compared(loss):
    bench.require_same({"llm_emo": 1.0, "trl": 1.000001}, {"llm_emo": []})
    with pytest.raises(JobFailed, match="trl"):
        bench.require_same({"llm_emo": 1.0, "trl": loss}, {"llm_emo": []})


def test_sides_with_different_targets_are_not_compared():
    same = {"llm_emo": [result(1.0)], "trl": [result(1.0)]}
    bench.require_same({"llm_emo": 1.0}, same)
    with pytest.raises(JobFailed, match="trl trained on other tokens"):
        bench.require_same({"llm_emo": 1.0}, same | {"trl": [result(1.0, trained="b")]})


def test_the_arguments_of_the_help_text_parse(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: object())
    given = bench.arguments(
        ["--data-root", "data", "--recipe", "sst2/lora", "--steps", "2", "--rounds", "1",
         "--peers", "trl,padded", "--set", "model.dtype=float32", "-o", "out.json"]
    )  # fmt: skip
    assert given.peers == ["trl", "padded"]
    assert given.overrides == ["model.dtype=float32"]
    assert (given.steps, given.rounds, given.batch_size) == (2, 1, 16)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--peers", "trl,unsloth"], "unknown unsloth"),
        (["--peers", "llm_emo"], "unknown llm_emo"),
        (["--steps", "0"], "--steps: expected 1 or more"),
    ],
)
def test_wrong_arguments_exit_with_2(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.arguments(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_without_trl_the_message_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        bench.arguments([])
    assert "pip install -e .[bench]" in capsys.readouterr().err
    assert bench.arguments(["--peers", "padded"]).peers == ["padded"]


def test_encoded_rows_become_labels_behind_the_prompt():
    assert list(bench.labelled([Encoded("a", (3, 4), (7, 2))])) == [
        {"input_ids": [3, 4, 7, 2], "attention_mask": [1] * 4, "labels": [-100, -100, 7, 2]}
    ]


def measured(side, rate, trl=None):
    versions = {"torch": "2.0", "transformers": "5.0", "peft": "0.2", "trl": trl}
    machine = {"model": "tiny", "versions": versions, "started": "today", "cpu": "chip", "cores": 2}
    return result(rate) | {
        "environment": machine,
        "method": {"kind": "lora", "rank": 8},
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": 2,
        "losses": [1.0 if side == "llm_emo" else 1.25],
        "targets": 40,
        "tokens_per_step": 100.0,
        "tokens_of_rows_per_step": 300.0,
        "peak_memory_bytes": 3 * 2**20,
    }


def test_the_report_shows_rates_ratios_differences_and_versions():
    results = {
        "llm_emo": [measured("llm_emo", rate) for rate in (12.0, 20.0, 14.0)],
        "padded": [measured("padded", rate) for rate in (4.0, 4.0, 4.0)],
        "trl": [measured("trl", rate, trl="1.16.0") for rate in (2.0, 2.0, 2.0)],
    }
    losses = {"llm_emo": 1.0, "padded": 1.0, "trl": 1.000001}
    text = bench.report(losses, results, bench.arguments(["--peers", "padded"]))
    assert "torch 2.0, transformers 5.0, peft 0.2, trl 1.16.0" in text
    assert "llm_emo / trl: 7.00x (rounds: 6.00, 10.00, 7.00)" in text
    assert "llm_emo / padded: 3.50x" in text
    assert "differ by 1.0e-06 in float32, 2.5e-01 in bfloat16" in text
    assert "120 targets" in text
    row = next(line for line in text.splitlines() if line.startswith("llm_emo "))
    assert row.split() == ["llm_emo", "14.00", "12.00", "20.00", "100", "3", "MiB"]
