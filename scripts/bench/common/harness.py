"""What all benchmarks share: processes, turns, medians, memory, machine, environments, tables.

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
import venv
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
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


def add_common(parser: argparse.ArgumentParser, *, rounds: int = 3) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help="turns of each side (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which rows, in which order")
    parser.add_argument("-o", "--output", type=Path, help="also write everything to a JSON file")
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)


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


def peers_of(parser: argparse.ArgumentParser, text: str, sides: Mapping[str, str]) -> list[str]:
    """Split `--peers`; exits with 2 where one is unknown."""
    peers = [name for name in text.split(",") if name]
    if unknown := [name for name in peers if name not in sides or name == OURS]:
        known = ", ".join(name for name in sides if name != OURS)
        parser.error(f"--peers: unknown {', '.join(unknown)} (known: {known})")
    return peers


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


# --- an environment of one peer's own -----------------------------------------------------------


def peer_python(
    name: str,
    requirements: Sequence[str],
    *,
    constraints: Sequence[str] = (),
    without: Sequence[str] = (),
) -> Path:
    """Return the Python of an environment that has a peer's requirements, made on first use.

    Args:
        name: The environment's name, under `build/bench` of the checkout.
        requirements: What to install.
        constraints: Further versions to hold to, as pip writes them.
        without: Packages to take away again afterwards.

    Packages of this Python are seen from there, torch above all; what the peer pins otherwise is
    installed there, where it shadows them, and changes nothing here.

    Raises:
        JobFailed: they cannot be installed; the message ends with pip's own.
    """
    from llm_emo.errors import JobFailed

    folder = ROOT / "build" / "bench" / name
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = folder / "complete"
    wanted = "\n".join([*requirements, *constraints, *without])
    if done.exists() and done.read_text("utf-8") == wanted:
        return python
    tell(f"{folder}: installing {', '.join(requirements)}")
    venv.create(folder, clear=True, with_pip=True)
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in here]
    (_site_packages(python) / "parent.pth").write_text("\n".join(lines) + "\n", "utf-8")
    held = folder / "constraints.txt"
    held.write_text("".join(f"{line}\n" for line in constraints), "utf-8")
    command = [python, "-m", "pip", "install", "--quiet", "-c", held, *requirements]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if installed.returncode:
        tail = " ".join(installed.stderr.strip().splitlines()[-6:])
        raise JobFailed(f"{name}: {', '.join(requirements)} cannot be installed: {tail}")
    if without:
        command = [python, "-m", "pip", "uninstall", "--quiet", "--yes", *without]
        subprocess.run(command, capture_output=True, check=True)
    done.write_text(wanted, "utf-8")
    return python


def _site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def stock(model: Any) -> Any:
    """Give a model transformers' own attention back, which is what users of a peer have."""
    for module in model.modules():
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("sdpa")
            return model
    raise ValueError("no model of transformers in it")


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

    from llm_emo import runs

    versions = runs.versions()
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
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
    """Return the rates of all sides (median, least, most), further columns, peak memory.

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
                f"{memory:.0f} MiB",
            ]
        )
    heads = ["", rate.replace("_per_second", "/s"), "min", "max"]
    return columns([*heads, *(head for head, _ in extra), "peak memory"], rows)


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
