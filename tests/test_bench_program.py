"""The benchmarks of the program around the model: start-up, volume, time to a score."""

import json
import sys
import time

import pytest
import tiny
from benches import common, load

from llm_emo.errors import JobFailed

harness = common("harness")
startup, volume, timing = load("startup"), load("volume"), load("time_to_score")
MACHINE = {
    "versions": {"torch": "2"}, "started": "today", "cpu": "chip", "gpu": None, "cores": 2,
    "threads": 1,
}  # fmt: skip


def test_a_log_has_a_step_only_when_its_line_is_whole(tmp_path):
    log = tmp_path / "log.jsonl"
    assert not startup.logged(log)
    log.write_text('{"step": 1, "loss": 2')
    assert not startup.logged(log)
    log.write_text('{"step": 1, "eval_accuracy": 2.0}\n')
    assert not startup.logged(log)
    log.write_text('{"step": 1, "loss": 2.0}\n')
    assert startup.logged(log)


def test_a_command_is_ended_as_soon_as_it_shows_what_is_waited_for(tmp_path):
    shown = tmp_path / "shown"
    code = f"import pathlib, time; pathlib.Path({str(shown)!r}).touch(); time.sleep(60)"
    assert startup.until([sys.executable, "-c", code], shown.exists) < 30


def test_a_command_that_fails_is_told_and_not_timed(tmp_path):
    code = "import sys; sys.exit('error: no such recipe')"
    with pytest.raises(JobFailed, match="error: no such recipe"):
        startup.until([sys.executable, "-c", code], (tmp_path / "never").exists)
    with pytest.raises(JobFailed, match="exit 1: error: no such recipe"):
        startup.ended([sys.executable, "-c", code])


def test_a_limit_is_held_against_the_median():
    results = {"check": [{"seconds": 1.0}, {"seconds": 9.0}, {"seconds": 2.5}]}
    given = startup.arguments(["--rounds", "3"])
    assert startup.report(results, MACHINE, given).splitlines()[-1].split()[-1] == "yes"
    results["check"][0]["seconds"] = 3.5
    assert startup.report(results, MACHINE, given).splitlines()[-1].split()[-1] == "no"


@pytest.mark.parametrize("mode", ["score", "generate"])
def test_every_generated_row_is_labelled_once(mode, monkeypatch):
    monkeypatch.setattr(volume, "TIMED", 50)
    given = volume.arguments(["--side", "30", "--mode", mode])
    result = volume.measure(given)
    assert (result["rows"], result["times"]) == (30, 2)
    assert result["rows"] / result["seconds"] == pytest.approx(result[volume.RATE])


def test_generated_texts_are_a_function_of_the_seed():
    assert list(volume.texts(5, 1)) == list(volume.texts(5, 1)) != list(volume.texts(5, 2))


def test_rows_that_cost_more_or_memory_that_grows_is_shown():
    def rounds(rows, seconds, memory):
        return [{"rows": rows, "seconds": seconds, "peak_memory_bytes": memory, "machine": MACHINE}]

    given = volume.arguments(["--rounds", "1"])
    for seconds, memory, verdict in ((10.5, 105, "yes"), (12.0, 100, "no"), (10.0, 120, "no")):
        results = {"100": rounds(100, 1.0, 100 << 20), "1000": rounds(1000, seconds, memory << 20)}
        assert volume.report(results, given).splitlines()[-1].split()[-1] == verdict


def test_rows_are_compared_within_a_round():
    def rounds(rows, *times):
        return [
            {"rows": rows, "seconds": rows * time, "peak_memory_bytes": 1 << 20, "machine": MACHINE}
            for time in times
        ]

    given = volume.arguments(["--rounds", "3"])
    results = {"100": rounds(100, 1.0, 2.0, 4.0), "1000": rounds(1000, 1.05, 2.1, 1.0)}
    last = volume.report(results, given).splitlines()[-1].split()
    assert "+5.0%" in last
    assert last[-1] == "yes"


@pytest.mark.parametrize("rows", ["0", "1,x", ""])
def test_a_number_of_rows_that_is_none_is_refused(rows, capsys):
    with pytest.raises(SystemExit) as exit_:
        volume.arguments(["--rows", rows])
    assert exit_.value.code == 2
    assert "--rows" in capsys.readouterr().err


# --- what all of them share -------------------------------------------------------------------


def test_sides_take_turns():
    asked = []

    def measure(side, turn):
        asked.append((side, turn))
        return {"rate": 1.0}

    harness.take_turns(["a", "b"], 2, measure, rate="rate")
    assert asked == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_a_measurement_is_a_process_of_its_own_and_its_last_line_counts(tmp_path):
    script = tmp_path / "side.py"
    script.write_text("import os, json\nprint('noise')\nprint(json.dumps({'pid': os.getpid()}))")
    assert harness.run(script, [])["pid"] != harness.run(script, [])["pid"]


def test_a_measurement_that_fails_ends_the_benchmark_with_its_exit_code(tmp_path, capsys):
    script = tmp_path / "side.py"
    script.write_text("import sys\nprint('error: no data', file=sys.stderr)\nsys.exit(2)")
    with pytest.raises(SystemExit) as exit_:
        harness.run(script, [])
    assert exit_.value.code == 2
    assert "error: no data" in capsys.readouterr().err


def test_the_peak_of_memory_begins_anew(tmp_path):
    script = tmp_path / "peak.py"
    script.write_text(
        "import json\n"
        "from common import harness\n"
        "block = bytearray(300 * 2**20)\n"
        "high = harness.peak_memory()\n"
        "del block\n"
        "harness.forget_peak()\n"
        "print(json.dumps([high, harness.peak_memory()]))\n"
    )
    paths = str(harness.ROOT / "scripts" / "bench")
    high, low = harness.run(script, [], environment={"PYTHONPATH": paths})
    assert high > 300 * 2**20
    assert low < high - 200 * 2**20


def test_what_is_written_names_its_command_and_seed(tmp_path):
    given = volume.arguments(["--seed", "7", "-o", str(tmp_path / "out.json")])
    harness.write(given, "volume.py", ["--seed", "7"], results=[1])
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == {"command": "scripts/bench/volume.py --seed 7", "seed": 7, "results": [1]}


# --- time to a score --------------------------------------------------------------------------


def watched(tmp_path, values, *, target, every):
    """Train four steps of the tiny model under a score that goes through `values`."""
    trainers = common("trainers")
    rows = tiny.encoded(8)
    trainer = trainers.trainer_of(
        "padded", tiny.adapted("llama", "lora"), tiny.tokenizer(),
        [rows[start : start + 2] for start in (0, 2, 4, 6)],
        tiny.train(batch_size=2, micro_batch_size=2), folder=tmp_path, seed=0,
    )  # fmt: skip
    left = iter(values)

    def score():
        time.sleep(0.5)
        return next(left)

    return timing.until_target(trainer, score, target=target, every=every)


def test_training_stops_at_the_first_measurement_that_reaches_the_target(tmp_path):
    seconds, trail = watched(tmp_path, [0.1, 0.7, 0.9, 0.9], target=0.6, every=1)
    assert [step for step, _, _ in trail] == [1, 2]
    assert seconds == trail[-1][1]


def test_measuring_is_off_the_clock(tmp_path):
    started = time.perf_counter()
    seconds, trail = watched(tmp_path, [0.1, 0.2, 0.3, 0.7], target=0.6, every=1)
    assert len(trail) == 4
    assert seconds <= time.perf_counter() - started - 4 * 0.5


def test_the_last_step_is_measured_and_a_target_that_is_not_reached_has_no_time(tmp_path):
    seconds, trail = watched(tmp_path, [0.1, 0.2], target=0.6, every=3)
    assert [step for step, _, _ in trail] == [3, 4]
    assert seconds is None


def test_a_target_that_is_no_share_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        timing.arguments(["--target", "60"])
    assert exit_.value.code == 2
    assert "--target: expected a share" in capsys.readouterr().err
