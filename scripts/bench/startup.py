"""Start-up: how long until the program helps, checks a recipe, and has done its first step.

    python scripts/bench/startup.py

Each is a command as a user types it, in a process of its own, on the wall clock from its start:
`--help` and `check` to their end, `train` until the first step's loss stands in the run's log,
after which it is ended. Everything that is fetched once (the bundled model, the corpus) is fetched
before. The first round is not counted: it fills the system's file cache, and keeps what a check
asks of the model, as loading the model for training does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import harness
from common.harness import ROOT, Result

PROGRAM = (sys.executable, "-m", "llm_emo")
PATIENCE = 600
"""Seconds after which a command that shows nothing has failed."""


@dataclass(frozen=True)
class Case:
    """A command, what is waited for, and the seconds that it may take."""

    name: str
    waits_for: str
    limit: float


CASES = (
    Case("help", "`llm-emo --help` ends", 0.3),
    Case("check", "`llm-emo check RECIPE` ends", 3.0),
    Case("first_step", "`llm-emo train RECIPE` has logged its first step", 15.0),
)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments; exits with 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description="Print how long the program takes to start, beside what it may take.",
        epilog="example: python scripts/bench/startup.py --rounds 5 -o startup.json",
    )
    harness.add_recipe(parser, "vader/lora")
    parser.add_argument(
        "--cases", default=",".join(case.name for case in CASES), metavar="A,B",
        help="what to measure (default: %(default)s)",
    )  # fmt: skip
    harness.add_common(parser, rounds=5)
    given = parser.parse_args(argv)
    given.cases = given.cases.split(",")
    known = [case.name for case in CASES]
    if unknown := [name for name in given.cases if name not in known]:
        parser.error(f"--cases: unknown {', '.join(unknown)} (known: {', '.join(known)})")
    return given


def options(given: argparse.Namespace) -> list[str]:
    """Return what every verb is told about the recipe."""
    words = [word for value in given.overrides for word in ("--set", value)]
    return [
        given.recipe,
        *words,
        *(("--data-root", str(given.data_root)) if given.data_root else ()),
    ]


def seconds_of(case: str, given: argparse.Namespace) -> float:
    """Run a case once; return its seconds.

    Raises:
        JobFailed: the command failed, or showed nothing for ten minutes.
    """
    if case == "help":
        return ended([*PROGRAM, "--help"])
    if case == "check":
        return ended([*PROGRAM, "check", *options(given)])
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        return until(
            [*PROGRAM, "train", "-o", str(run), *options(given)],
            lambda: logged(run / "log.jsonl"),
        )


def logged(log: Path) -> bool:
    """Whether a step's loss stands in the log."""
    if not log.exists():
        return False
    lines = [line for line in log.read_text("utf-8").splitlines(keepends=True) if line[-1] == "\n"]
    return any("loss" in json.loads(line) for line in lines)


def environment() -> dict[str, str]:
    """Return the environment, with this checkout in front."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def ended(command: Sequence[str]) -> float:
    """Return how long a command takes to its end."""
    from llm_emo.errors import JobFailed

    started = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(), timeout=PATIENCE
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise JobFailed(f"{' '.join(command[2:])}: exit {done.returncode}: {last(done.stderr)}")
    return seconds


def until(command: Sequence[str], shown: Callable[[], bool]) -> float:
    """Return how long a command takes until `shown`, and end it."""
    from llm_emo.errors import JobFailed

    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env=environment()
        )
        try:
            while not shown():
                if process.poll() is not None and not shown():
                    errors.seek(0)
                    raise JobFailed(
                        f"{' '.join(command[2:])}: ended with {process.returncode} before its "
                        f"first step: {last(errors.read())}"
                    )
                if time.perf_counter() - started > PATIENCE:
                    raise JobFailed(f"{' '.join(command[2:])}: no step in {PATIENCE} s")
                time.sleep(0.01)
            return time.perf_counter() - started
        finally:
            process.kill()
            process.wait()


def last(text: str) -> str:
    """Return the last line that says something."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def report(results: dict[str, list[Result]], machine: Result, given: argparse.Namespace) -> str:
    """Return everything that is printed."""
    rows = []
    for case in CASES:
        if case.name not in results:
            continue
        seconds = [result["seconds"] for result in results[case.name]]
        middle = statistics.median(seconds)
        rows.append(
            [
                case.waits_for.replace("RECIPE", given.recipe),
                f"{middle:.2f} s", f"{min(seconds):.2f}", f"{max(seconds):.2f}",
                f"{case.limit:.1f} s", "yes" if middle < case.limit else "no",
            ]
        )  # fmt: skip
    return "\n".join(
        [
            f"{given.rounds} rounds after one for warming up",
            *harness.machine_lines({harness.OURS: [{"machine": machine}]}, "torch", "transformers"),
            "",
            harness.columns(["until", "median", "min", "max", "limit", "within"], rows),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    given = arguments(argv)

    def body() -> None:
        for case in given.cases:
            seconds_of(case, given)
        results = harness.take_turns(
            given.cases, given.rounds,
            lambda case, turn: {"round": turn, "seconds": seconds_of(case, given)}, rate="seconds",
        )  # fmt: skip
        machine = harness.machine()
        harness.write(given, "startup.py", argv, machine=machine, results=results,
                      limits={case.name: case.limit for case in CASES})  # fmt: skip
        print(report(results, machine, given))

    return harness.main(body)


if __name__ == "__main__":
    raise SystemExit(main())
