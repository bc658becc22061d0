"""What all benchmarks share: processes, turns, medians, memory, machine, tables.

Every measurement is a process of its own, so that memory, caches and thread pools of one side are
not those of another, and sides take turns (A B A B ...), so that a machine that slows down slows
all of them.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:  # this checkout, installed or not
    sys.path.append(str(ROOT))
OURS = "llm_emo"

Result = dict[str, Any]
Rounds = Mapping[str, Sequence[Result]]
"""What every side measured, round by round."""


# --- arguments ----------------------------------------------------------------------------------


def add_common(
    parser: argparse.ArgumentParser,
    *,
    rounds: int = 3,
    sides: Mapping[str, str] | None = None,
    check: str | None = None,
) -> None:
    """Add the options that every benchmark has, and those of one side and of its `check`."""
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help="turns of each side (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which rows, in which order")
    parser.add_argument("-o", "--output", type=Path, help="also write everything to a JSON file")
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    if sides:
        parser.epilog = f"{parser.epilog}; sides: " + "; ".join(
            f"{name} = {text}" for name, text in sides.items()
        )
        parser.add_argument(
            "--side", choices=sides, help="measure one side once and print its JSON, nothing else"
        )
    if check:
        parser.add_argument("--check", action="store_true", help=f"with --side: {check}")


def add_peers(
    parser: argparse.ArgumentParser,
    sides: Mapping[str, str],
    default: str | None,
    shown: str = "%(default)s",
) -> None:
    """Add the option that names the other sides."""
    known = [name for name in sides if name != OURS]

    def names(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(
                f"unknown {', '.join(unknown)} (known: {', '.join(known)})"
            )
        return found

    parser.add_argument(
        "--peers", type=names, default=default, metavar="A,B",
        help=f"whom to measure beside {OURS} (default: {shown})",
    )  # fmt: skip


def add_recipe(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that name a recipe, its data and its overrides."""
    parser.add_argument(
        "--recipe", default=default, help="a recipe's name or file (default: %(default)s)"
    )
    parser.add_argument("--data-root", type=Path, help="the folder that holds the corpora")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a recipe's key, such as model.dtype=float32; repeatable",
    )  # fmt: skip


def positive(text: str) -> int:
    """Read a count of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected 1 or more")
    return number


# --- processes that take turns ------------------------------------------------------------------


def run(
    script: Path | str,
    argv: Sequence[str],
    *options: str,
    python: Path | str = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> Result:
    """Run a script in a process of its own; return the JSON of its last line.

    Exits as that process did, with its messages, where it failed.
    """
    # Peers report what is trained to their hubs; a benchmark is no usage.
    given = os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", **(environment or {})}
    paths = [str(ROOT), given.get("PYTHONPATH", "")]
    given["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [str(python), str(script), *argv, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=given, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SystemExit(done.returncode if done.returncode > 0 else 1)
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def side_of(script: str, argv: Sequence[str]) -> Callable[..., Result]:
    """Return what measures a side once, with further options, in a process of its own."""
    return lambda side, *options: run(script, argv, "--side", side, *options)


def take_turns(
    sides: Sequence[str], rounds: int, measure: Callable[[str, int], Result], *, rate: str
) -> dict[str, list[Result]]:
    """Measure every side once a round, A B A B; `rate` names the result told on the way."""
    results: dict[str, list[Result]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side in sides:
            results[side].append(measure(side, turn))
            value = results[side][-1][rate]
            tell(f"round {turn + 1}: {side}: {value:.2f} {rate.replace('_', ' ')}")
    return results


def in_turn(
    sides: Sequence[str], rounds: int, one: Callable[..., Result], *, rate: str
) -> dict[str, list[Result]]:
    """Measure every side in turn by `one(side, *options)`; write down what share each reached."""
    results = take_turns(
        sides, rounds, lambda side, turn: one(side, "--round", str(turn)), rate=rate
    )
    with_shares(results)
    return results


def checked(sides: Sequence[str], one: Callable[..., Result], key: str) -> dict[str, Any]:
    """Return what every side computes in float32 under `key`."""
    return {side: one(side, "--check")[key] for side in sides}


def with_shares(results: Rounds) -> None:
    """Write down each side's share of the machine's matrix rate, where that was measured."""
    measured = [own for own in results.get(OURS, ()) if own.get("matrix")]
    for rounds in results.values() if measured else ():
        for own, result in zip(measured, rounds, strict=True):
            result["share_of_matrix_rate"] = share_of(own, result)


def share_of(own: Result, result: Result) -> float:
    """Return which share of the round's matrix rate a side reached.

    What is needed is what this program's side counted, or the side itself where it says so.
    """
    operations = result.get("operations", own["matrix"]["operations"])
    total = sum(operations.values()) if isinstance(operations, dict) else operations
    seconds = result["seconds"] if "seconds" in result else sum(result["seconds_per_step"])
    return float(total / own["matrix"]["operations_per_second"] / seconds)


def tell(text: str) -> None:
    """Write a line of progress."""
    print(text, file=sys.stderr, flush=True)


def ratios(results: Rounds, rate: str) -> dict[str, list[float]]:
    """Return, for each peer, this program's rate over the peer's, round by round."""
    return {
        peer: [own[rate] / other[rate] for own, other in zip(results[OURS], rounds, strict=True)]
        for peer, rounds in results.items()
        if peer != OURS
    }


def ratio_line(peer: str, values: Sequence[float]) -> str:
    """Return a peer's ratios as they are printed."""
    each = ", ".join(f"{value:.2f}" for value in values)
    return f"{OURS} / {peer}: {statistics.median(values):.2f}x (rounds: {each})"


# --- what is measured on ------------------------------------------------------------------------


def stock(model: Any) -> None:
    """Give a model transformers' own attention and layers back, which users of a peer have."""
    attend_by(model, "sdpa")
    for module in model.modules():
        own = vars(module).get("forward")
        if isinstance(own, partial) and own.func.__module__.startswith("llm_emo."):
            del module.forward  # and the copies of weights that it keeps


def attend_by(model: Any, name: str) -> None:
    """Give a model the attention that transformers knows by this name."""
    for module in model.modules():
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation(name)
            return
    raise ValueError("no model of transformers in it")


def opened(given: argparse.Namespace, recipe: Any) -> Any:
    """Return a recipe's labeller over the data that the arguments name.

    Raises:
        EmoError: recipe, data and model do not fit.
    """
    from llm_emo.experiment import Experiment, data_root
    from llm_emo.labelling import open_labeller

    return open_labeller(Experiment.prepare(recipe, data_root(given.data_root)))


def described(given: argparse.Namespace, labeller: Any, *shown: str) -> Result:
    """Return what every side tells besides its figures."""
    return {
        "side": given.side,
        "round": given.round,
        "dtype": labeller.base.dtype,
        "device": str(labeller.base.model.device),
        "model": labeller.experiment.recipe.model.name,
        "machine": machine(*shown),
    }


# --- memory, machine ----------------------------------------------------------------------------


def forget_peak() -> None:
    """Let the peak of memory begin here, where the system can; loading a model has its own."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def peak_memory() -> int:
    """Return the most memory this process held, in bytes; on a GPU, the GPU's."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    # Not `ru_maxrss`: what `forget_peak` resets is what the kernel shows here.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronise() -> None:
    """Wait for the GPU, so that a clock tells when its work is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def clock(seconds: list[float]) -> Any:
    """Append the seconds that the block takes."""
    synchronise()
    started = time.perf_counter()
    yield
    synchronise()
    seconds.append(time.perf_counter() - started)


def machine(*packages: str) -> dict[str, Any]:
    """Return what figures depend on besides the program: machine, versions, date."""
    import torch

    from llm_emo import native, runs

    versions = runs.versions()
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native": native.library(torch.bfloat16) is not None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "versions": versions,
    }


def cpu() -> str:
    """Return the processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_lines(results: Rounds, *shown: str) -> list[str]:
    """Return the lines on machine, versions and date; peers' own versions are told apart."""
    ours = results[OURS][0]["machine"]
    versions = dict(ours["versions"])
    other = []
    for side, rounds in results.items():
        for name in shown:
            found = rounds[0]["machine"]["versions"].get(name)
            if found is None:
                continue
            if versions.setdefault(name, found) != found:
                other.append(f"{name} {found} in {side}")
    known = [f"{name} {versions[name]}" for name in shown if name in versions]
    return [
        f"{ours['gpu'] or ours['cpu']}, {ours['cores']} cores, {ours['threads']} threads; "
        f"{', '.join(known + other)}; {ours['started']}"
    ]


# --- tables and files ---------------------------------------------------------------------------


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table: first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heads, *rows)
    )


def rates_table(results: Rounds, rate: str, *extra: tuple[str, Callable[[Result], str]]) -> str:
    """Return all sides' rates (median, least, most), further columns, share, peak memory.

    Args:
        results: What was measured.
        rate: The key of the rate.
        extra: Heads and what stands below them, of a side's first round.
    """
    rows = []
    for side, rounds in results.items():
        rates = [result[rate] for result in rounds]
        memory = max(result["peak_memory_bytes"] for result in rounds) / 2**20
        rows.append(
            [
                side,
                f"{statistics.median(rates):.2f}",
                f"{min(rates):.2f}",
                f"{max(rates):.2f}",
                *(show(rounds[0]) for _, show in extra),
                f"{statistics.median(result['share_of_matrix_rate'] for result in rounds):.0%}",
                f"{memory:.0f} MiB",
            ]
        )
    heads = ["", rate.replace("_per_second", "/s"), "min", "max"]
    return columns([*heads, *(head for head, _ in extra), "matrix share", "peak memory"], rows)


def bench(
    script: str,
    argv: Sequence[str] | None,
    arguments: Callable[[Sequence[str]], argparse.Namespace],
    measure: Callable[[argparse.Namespace], Result],
    compare: Callable[[Sequence[str], argparse.Namespace], tuple[str, Mapping[str, Any]]],
) -> int:
    """Run a benchmark, or with `--side` one side of it; return the exit code.

    Args:
        script: The benchmark's file.
        argv: What it is called with; None for the command line.
        arguments: Parses that.
        measure: Measures the side in this process; its result is printed as JSON.
        compare: Measures all sides; returns what is printed, and what else `-o` keeps.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = arguments(argv)

    def body() -> None:
        if given.side:
            print(json.dumps(measure(given)))
            return
        text, content = compare(argv, given)
        write(given, Path(script).name, argv, **content)
        print(text)

    return main(body)


def figures(results: Rounds, rate: str) -> dict[str, Any]:
    """Return what is written of all sides."""
    return {"ratios": ratios(results, rate), "results": results}


def write(given: argparse.Namespace, script: str, argv: Sequence[str], **content: Any) -> None:
    """Write everything that was measured to the file that `-o` names, if it does."""
    from llm_emo.runs import write_json

    if given.output:
        command = shlex.join([f"scripts/bench/{script}", *argv])
        write_json(given.output, {"command": command, "seed": given.seed, **content})


def main(body: Callable[[], None]) -> int:
    """Run a benchmark; return its exit code, with one message where it fails."""
    from llm_emo.errors import EmoError

    try:
        body()
    except EmoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
