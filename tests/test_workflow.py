"""End to end: what a run leaves, that it can be continued, and that the parts agree."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import program
import pytest
import torch
from safetensors.torch import load_file

from llm_emo import labelling, predictions, recipes, workflow
from llm_emo.experiment import Experiment

RUN_FILES = {"recipe.yaml", "overrides.json", "prompt.yaml", "labels.json", "environment.json",
             "log.jsonl", "adapter", "checkpoints", "tensorboard"}  # fmt: skip
REPORT_KEYS = {"n", "protocol", "accuracy", "macro_f1", "weighted_f1", "unweighted_accuracy",
               "parse_rate", "per_class", "confusion", "ci", "ece"}  # fmt: skip


def evaluate(source, *options, **kwargs):
    return json.loads(program.call("evaluate", source, *options, "--json", **kwargs).ok().out)


def rows(folder, split="test"):
    return predictions.read(folder / f"{split}.predictions.jsonl")


def probabilities(read):
    return [[row.probabilities[name] for name in read[0].labels] for row in read[1]]


# --- train ------------------------------------------------------------------------------------


def test_a_run_leaves_exactly_the_files_of_the_design(trained):
    # The run is shared by the tests, and evaluating adds two files a split.
    left = {path.name for path in trained.iterdir()}
    assert {name for name in left if not name.startswith(("test.", "dev."))} == RUN_FILES
    for name in ("overrides.json", "labels.json", "environment.json"):
        json.loads((trained / name).read_text("utf-8"))
    adapter = {path.name for path in (trained / "adapter").iterdir()}
    assert adapter == {"adapter_config.json", "adapter_model.safetensors", "fingerprint.json"}
    assert not [path for path in trained.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_training_never_reads_the_test_split(tiny_folder, tmp_path, monkeypatch):
    asked = []
    own = Experiment.rows

    def spy(self, split):
        asked.append(split)
        return own(self, split)

    monkeypatch.setattr(Experiment, "rows", spy)
    program.train(tmp_path / "run", tiny_folder, "mastodon/lora", "train.epochs=1")
    assert set(asked) == {"train", "dev"}


def test_training_prints_one_object_on_stdout_and_progress_on_stderr(tiny_folder, tmp_path):
    options = program.on(tiny_folder, "train.epochs=1")
    told = program.call("train", "mastodon/lora", "-o", tmp_path / "r", *options, "--json").ok()
    summary = json.loads(told.out)
    assert summary["run"] == str(tmp_path / "r")
    assert summary["trainable_parameters"] > 0
    assert summary["tokens_saved"] > 0
    assert "parameters learn" in told.err
    assert "dev at step" in told.err
    assert "Loading weights" not in told.err


def test_the_log_holds_every_step_and_every_evaluation(trained):
    entries = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    losses = [entry["step"] for entry in entries if "loss" in entry]
    assert losses == list(range(1, len(losses) + 1))
    assert [entry["step"] for entry in entries if "eval_accuracy" in entry] == [
        len(losses) // 2, len(losses)
    ]  # fmt: skip


def interrupt_at(step, monkeypatch):
    own = workflow.Progress.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        own(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(workflow.Progress, "on_step_end", interrupted)


def trail(run):
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]


def tokens(summary):
    return summary["tokens_run"] + summary["tokens_saved"]


def assert_same(found, expected, *, rel):
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=rel)


@pytest.mark.parametrize("recipe", ["mastodon/lora", "mastodon/p_tuning_v2"])
def test_a_resumed_run_equals_the_uninterrupted_one(recipe, tiny_folder, tmp_path, monkeypatch):
    changes = ["method.prefix_length=4"] if recipe.endswith("v2") else ["method.dropout=0.2"]
    whole = program.train(tmp_path / "whole", tiny_folder, recipe, *changes)
    steps = len(trail(whole))
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        interrupt_at(steps - 1, patch)  # in the second epoch, behind a checkpoint
        told = program.call("train", recipe, "-o", broken, *program.on(tiny_folder, *changes))
    told.refused("--resume", code=130)
    assert not (broken / "adapter").exists()
    assert len(trail(broken)) > steps // 2
    told = program.call("train", broken / "recipe.yaml", "-o", broken, "--resume").ok()
    assert f"continuing from {broken}" in told.err
    assert_same(trail(broken), trail(whole), rel=1e-6)
    one, two = (load_file(run / "adapter/adapter_model.safetensors") for run in (whole, broken))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


def test_a_run_interrupted_before_its_first_checkpoint_begins_anew(
    tiny_folder, tmp_path, monkeypatch
):
    whole = program.train(tmp_path / "whole", tiny_folder)
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        interrupt_at(1, patch)
        program.call("train", "mastodon/lora", "-o", broken, *program.on(tiny_folder))
    told = program.call("train", "mastodon/lora", "-o", broken, "--resume").ok()
    assert "no checkpoint yet; training starts from the beginning" in told.err
    assert_same(trail(broken), trail(whole), rel=1e-6)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("friends/lora_dialogue", ["train.epochs=1"]),
        ("m3ed/p_tuning_v2", ["train.epochs=1"]),
        ("ch_sims/lora", ["train.epochs=1", "train.gradient_checkpointing=true"]),
        ("sst5/lora", ["train.epochs=1", "model.dtype=bfloat16"]),
        ("iemocap/lora", ["train.epochs=1"]),
        ("mastodon/lora", ["train.epochs=1", "model.quantization=nf4"]),
        ("mastodon/lora", ["method={kind: full}", "train.learning_rate=1e-3"]),
    ],
)  # fmt: skip
def test_recipes_train_and_evaluate(recipe, changes, tiny_folder, tmp_path):
    run = program.train(tmp_path / "run", tiny_folder, recipe, "prompt.max_length=2048", *changes)
    report = evaluate(run)
    assert report["n"] == len(rows(run)[1]) > 0
    assert report["outcomes"]["scored"] == report["n"]
    assert sum(map(sum, report["confusion"])) == report["n"]


# --- predict and evaluate -----------------------------------------------------------------------


def test_a_report_has_the_keys_of_the_design(run_copy):
    report = evaluate(run_copy)
    assert report.keys() >= REPORT_KEYS
    assert report.keys() - REPORT_KEYS == {
        "dataset", "split", "outcomes", "without_gold", "ci_unit", "expected_rows", "complete"
    }  # fmt: skip
    assert report["expected_rows"] == 1142
    assert report["complete"] is False
    labels = ["negative", "neutral", "positive"]
    assert list(report["per_class"]) == labels
    assert all(set(v) == {"precision", "recall", "f1", "support"}
               for v in report["per_class"].values())  # fmt: skip
    assert [len(row) for row in report["confusion"]] == [4, 4, 4]
    assert json.loads((run_copy / "test.report.json").read_text("utf-8")) == report


def test_the_predictions_file_alone_gives_the_same_numbers_without_torch(run_copy):
    report = evaluate(run_copy)
    script = (
        "import sys; from llm_emo.cli import main\n"
        "sys.argv = ['llm-emo', 'evaluate', sys.argv[1], '--json']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = [n for n in ('torch', 'transformers', 'peft', 'evaluate') if n in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    told = program.spawn("-c", script, run_copy / "test.predictions.jsonl").ok()
    alone = json.loads(told.out)
    assert alone["ci_unit"] == "row"
    assert report["ci_unit"] == "dialogue"
    for name in alone.keys() - {"ci", "ci_unit"}:
        assert alone[name] == report[name], name


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.predictions.jsonl"])
def test_a_predictions_file_of_any_name_is_not_overwritten_by_its_report(name, run_copy, tmp_path):
    evaluate(run_copy)
    content = (run_copy / "test.predictions.jsonl").read_bytes()
    (tmp_path / name).write_bytes(content)
    program.call("evaluate", tmp_path / name).ok()
    assert (tmp_path / name).read_bytes() == content
    assert (tmp_path / "mine.report.json").is_file()


def test_what_is_predicted_is_not_predicted_again(run_copy, monkeypatch):
    report = evaluate(run_copy)
    before = (run_copy / "test.predictions.jsonl").read_bytes()
    monkeypatch.setattr(labelling, "open_labeller", None)  # no model is needed any more
    assert evaluate(run_copy) == report
    assert (run_copy / "test.predictions.jsonl").read_bytes() == before


def test_a_killed_prediction_continues_behind_its_last_whole_row(run_copy, tmp_path):
    program.call("predict", run_copy, "-o", tmp_path / "whole").ok()
    header, whole = rows(tmp_path / "whole")
    lines = (tmp_path / "whole/test.predictions.jsonl").read_bytes().splitlines(keepends=True)
    # Four rows in the order in which a trie meets them, one of them recognisable, and half a row.
    marked = json.loads(lines[4])
    marked["probabilities"] = dict.fromkeys(header.labels, 1 / 3)
    kept = [lines[0], lines[6], json.dumps(marked).encode() + b"\n", lines[1], lines[2]]
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "test.predictions.jsonl.partial").write_bytes(b"".join(kept) + lines[3][:40])
    told = program.call("predict", run_copy, "-o", killed).ok()
    assert "half-written" in told.err
    found_header, found = rows(killed)
    assert found_header == header
    assert [row.uid for row in found] == [row.uid for row in whole]
    assert found[3].probabilities == marked["probabilities"], "a done row was computed again"
    for index in (0, 1, 2, 4, 5, 6):
        assert found[index].probabilities == pytest.approx(whole[index].probabilities, abs=1e-5)
    assert [path.name for path in killed.iterdir()] == ["test.predictions.jsonl"]


@pytest.mark.parametrize("mode", ["score", "generate"])
def test_predictions_do_not_depend_on_the_tokens_per_pass(mode, run_copy, tmp_path):
    for budget in (1, 4096):
        program.call("predict", run_copy, "--mode", mode, "-o", tmp_path / str(budget),
                     "--set", f"inference.tokens_per_pass={budget}").ok()  # fmt: skip
    one, all_ = rows(tmp_path / "1"), rows(tmp_path / "4096")
    assert one[0] == all_[0], "the headers differ, so neither could continue the other"
    assert [(r.uid, r.label, r.completion) for r in one[1]] == [
        (r.uid, r.label, r.completion) for r in all_[1]
    ]
    if mode == "score":
        for a, b in zip(probabilities(one), probabilities(all_), strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_generated_answers_are_parsed_and_counted(run_copy, tmp_path):
    report = evaluate(run_copy, "--mode", "generate", "-o", tmp_path)
    header, found = rows(tmp_path)
    assert header.mode == "generate"
    assert all(row.completion is not None and row.probabilities is None for row in found)
    assert report["ece"] is None
    assert report["outcomes"]["scored"] == 0
    assert sum(report["outcomes"].values()) == report["n"] == 7
    assert report["parse_rate"] == sum(row.label is not None for row in found) / 7


def test_a_zero_shot_recipe_is_evaluated_directly(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = evaluate("mastodon/zero_shot", *program.on(tiny_folder, training=False))
    folder = tmp_path / "runs/mastodon-zero_shot"
    assert report["n"] == 7
    assert {path.name for path in folder.iterdir()} == {
        "test.predictions.jsonl", "test.report.json"
    }  # fmt: skip
    header, _ = rows(folder)
    assert header.run is None
    assert header.adapter is None


def test_the_dev_split_can_be_evaluated(run_copy):
    assert evaluate(run_copy, "--split", "dev")["split"] == "dev"
    assert (run_copy / "dev.report.json").exists()


def test_people_read_the_same_numbers(run_copy):
    report = evaluate(run_copy)
    told = program.call("evaluate", run_copy).ok()
    assert f"{report['macro_f1']:.4f}" in told.out


def test_a_folder_name_in_brackets_is_printed_as_it_is(tiny_folder, tmp_path):
    run = tmp_path / "[bold]run"
    told = program.call("train", "mastodon/lora", "-o", run, *program.on(tiny_folder)).ok()
    assert f"llm-emo evaluate {run}" in told.out


OTHER = ["prompt.name=dialogue_zh", "prompt.history_window=1", "prompt.max_length=1024",
         "data.limit={test: 6}", "seed=1", "model.dtype=bfloat16", "inference.mode=generate",
         "data.protocol=mastodon-posneg"]  # fmt: skip


@pytest.mark.parametrize("change", OTHER)
def test_predictions_under_other_settings_never_share_a_file(change, tiny_folder, tmp_path):
    plain = ["prompt.name=dialogue", "prompt.history_window=2", "prompt.max_length=2048"]
    options = program.on(tiny_folder, *plain, training=False)
    program.call("predict", "mastodon/zero_shot", "-o", tmp_path, *options).ok()
    before = (tmp_path / "test.predictions.jsonl").read_bytes()
    options = program.on(tiny_folder, *plain, change, training=False)
    told = program.call("evaluate", "mastodon/zero_shot", "-o", tmp_path, *options)
    told.refused("test.predictions.jsonl", "made under another", "-o")
    assert (tmp_path / "test.predictions.jsonl").read_bytes() == before


def test_the_quickstart_runs_three_methods_and_takes_up_what_is_there(
    tiny_folder, tmp_path, monkeypatch
):
    load, prepare = recipes.load, Experiment.prepare

    def small(name, changes=()):
        kept = [v for v in program.SMALL if "zero_shot" not in name or not v.startswith("train.")]
        return load(name, [f"model.name={tiny_folder}", *kept, *changes])

    monkeypatch.setattr(recipes, "load", small)
    monkeypatch.setattr(Experiment, "prepare", lambda recipe, _: prepare(recipe, program.FIXTURES))
    told = program.call("quickstart", "-o", tmp_path / "q", "--json").ok()
    result = json.loads(told.out)
    assert [row["method"] for row in result["methods"]] == ["zero_shot", "lora", "p_tuning_v2"]
    assert {entry["difference"] < 1e-3 for entry in result["exports"].values()} == {True}
    assert set(result["exports"]) == {"lora", "p_tuning_v2"}
    monkeypatch.setattr(workflow, "train", None)  # nothing is trained twice
    again = program.call("quickstart", "-o", tmp_path / "q").ok()
    assert "p_tuning_v2" in again.out
    assert again.err.count("already trained") == 2


# --- processes of their own ---------------------------------------------------------------------


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


TWICE = """
import json, sys
from llm_emo.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["llm-emo", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
"""


def test_two_processes_leave_the_trail_of_one_and_one_row_per_uid(trained, tiny_folder, tmp_path):
    run, script = tmp_path / "two", tmp_path / "script.py"
    script.write_text(TWICE)
    verbs = [["train", "mastodon/lora", "-o", run, *program.on(tiny_folder), "--json"],
             ["evaluate", run, "--json"]]  # fmt: skip
    told = program.spawn(
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2,
        "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", port(), script, json.dumps(verbs, default=str),
        environment={"PYTHONPATH": str(program.ROOT)},
    ).ok()  # fmt: skip
    # One of the two processes prints, and one report stands behind the other.
    summary, end = json.JSONDecoder().raw_decode(told.out)
    assert summary["run"] == str(run)
    assert json.loads(told.out[end:])["n"] == 7
    assert told.err.count("parameters learn") == 1
    assert_same(trail(run), trail(trained), rel=1e-4)
    alone = json.loads((trained / "environment.json").read_text("utf-8"))["training"]
    assert tokens(summary) == tokens(alone)
    program.call("predict", run, "-o", tmp_path / "one").ok()
    two, one = rows(run), rows(tmp_path / "one")
    assert two[0] == one[0]
    assert [row.uid for row in two[1]] == [row.uid for row in one[1]]
    for a, b in zip(probabilities(two), probabilities(one), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_a_launch_that_starts_one_process_only_says_so(tiny_folder, tmp_path, monkeypatch):
    # What `accelerate launch --cpu --num_processes 2` sets, where there is no MPI.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    options = program.on(tiny_folder, "train.epochs=1")
    told = program.call("train", "mastodon/lora", "-o", tmp_path / "run", *options).ok()
    assert "one process" in told.err
    assert "--multi_gpu --num_processes 2" in told.err


def test_ctrl_c_ends_training_with_a_message_that_says_how_to_continue(tiny_folder, tmp_path):
    run = tmp_path / "run"
    options = program.on(tiny_folder, "train.epochs=100000")
    command = [sys.executable, "-m", "llm_emo", "train", "mastodon/lora", "-o", run, *options]
    process = subprocess.Popen(
        list(map(str, command)), cwd=program.ROOT, env=program.clean(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Tests that were started in the background ignore the signal, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(Path(run).glob("checkpoints/checkpoint-*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    program.Outcome(process.returncode, out, err).refused("interrupted", "--resume", code=130)
    assert not (run / "adapter").exists()
    told = program.call("evaluate", run)
    told.refused("has not finished", "--resume")


# --- rare classes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    ["{kind: class_weights, strength: 1.0}", "{kind: focal, gamma: 2.0, balanced: true}",
     "{kind: logit_adjustment, tau: 1.0}", "{kind: resampling, strength: 1.0}"],
)  # fmt: skip
def test_an_llm_learns_under_every_remedy_and_differently(option, tiny_folder, tmp_path):
    def weights(name, *changes):
        folder = program.train(tmp_path / name, tiny_folder, "mastodon/lora", *changes)
        return load_file(folder / "adapter" / "adapter_model.safetensors")

    plain, remedied = weights("plain"), weights("remedied", f"train.imbalance={option}")
    assert plain.keys() == remedied.keys()
    assert any(not torch.equal(plain[name], remedied[name]) for name in plain)
