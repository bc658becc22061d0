"""Memory and speed of `llm-emo convert` on a checkpoint of several gigabytes.

    python scripts/bench/convert.py

It writes a random checkpoint of ChatGLM2-6B's shape with fewer layers into a temporary folder, as
shards of `torch.save` like the official ones, converts it there and back, each in a process of its
own, compares every bit of every tensor with what was written, and removes everything. It fails if
the memory exceeds 1.5 times the largest shard and 1 GiB.

What a process holds comes from the kernel, read every few milliseconds. `VmHWM` is the most that
was resident, and counts pages of mapped files: shards are mapped, so each page of them that was
read counts, although the kernel takes it back as soon as memory is short. `RssAnon` is what the
program itself holds.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GIB = 2**30
WATCHED = ("VmHWM", "RssAnon", "RssFile")
"""Of /proc/PID/status: all that was resident at most; without and from mapped files, now."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments; exits with 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description="Convert a generated ChatGLM2 checkpoint there and back; print peak memory, "
        "time and whether all bits came back.",
        epilog="example: python scripts/bench/convert.py --layers 3 --shards 3 -o convert.json",
    )
    parser.add_argument("--layers", type=int, default=3, help="of 28 (default: 3, which is 2.3 GB)")
    parser.add_argument("--shards", type=int, default=3, help="files of weights (default: 3)")
    parser.add_argument(
        "--small", action="store_true", help="a tiny shape, to try the script; measures nothing"
    )
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    parser.add_argument("-o", "--output", type=Path, help="also write everything to a JSON file")
    given = parser.parse_args(argv)
    if given.layers < 1 or given.shards < 1:
        parser.error("--layers and --shards: expected 1 or more")
    if not Path("/proc/self/status").is_file():
        parser.error("the kernel of this machine does not tell what a process holds (no /proc)")
    return given


def sizes(layers: int, small: bool) -> dict[str, int]:
    """Return the shape to generate."""
    if small:
        return {"layers": layers}
    return {
        "layers": layers, "hidden": 4096, "ffn": 13696, "heads": 32, "groups": 2,
        "head_dim": 128, "vocab": 65024, "positions": 32768,
    }  # fmt: skip


def parameters(shape: dict[str, int]) -> int:
    """Return how many parameters a model of this shape has."""
    sys.path.insert(0, str(ROOT / "tests"))
    import chatglm2_files

    from llm_emo.models.chatglm2 import Layout

    return Layout(**chatglm2_files.SIZES | shape).parameters


def generate(folder: Path, shards: int, shape: dict[str, int]) -> None:
    """Write the checkpoint and a tokenizer; in a process of its own, which then frees memory."""
    sys.path.insert(0, str(ROOT / "tests"))
    import chatglm2_files
    import chatglm2_tokens
    import torch

    chatglm2_files.write_checkpoint(folder, shards=shards, dtype=torch.float16, **shape)
    chatglm2_tokens.write_model(folder / "tokenizer.model")


def watched(command: Sequence[str], log: Path) -> dict[str, Any]:
    """Run a command; return its seconds and the most that it held, in bytes.

    Raises:
        SystemExit: it failed.
    """
    started = time.perf_counter()
    peaks = dict.fromkeys(WATCHED, 0)
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)
        while process.poll() is None:
            for name, held in _held(process.pid).items():
                peaks[name] = max(peaks[name], held)
            time.sleep(0.005)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text('utf-8', errors='replace')[-2000:]}")
    return {"seconds": time.perf_counter() - started, **peaks}


def _held(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in WATCHED if name in fields}


def equal(original: Path, back: Path) -> bool:
    """Whether two folders hold the same tensors, bit by bit, one at a time."""
    import torch

    from llm_emo.models import weights

    def where(folder: Path) -> dict[str, Path]:
        files, _ = weights.files_of(folder)
        return {name: file for file in files for name in weights.read(file)}

    one, other = where(original), where(back)
    if one.keys() != other.keys():
        return False
    for name in one:
        a, b = weights.read(one[name])[name], weights.read(other[name])[name]
        if a.dtype != b.dtype or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return False
    return True


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Generate, convert there and back, compare; return what was seen."""
    shape = sizes(given.layers, given.small)
    code = f"import runpy; m = runpy.run_path({str(Path(__file__))!r}); "
    code += f"m['generate'](m['Path']({str(folder / 'original')!r}), {given.shards}, {shape})"
    print("generating ...", file=sys.stderr)
    watched([sys.executable, "-c", code], folder / "log")
    shards = sorted((folder / "original").glob("pytorch_model*.bin"))
    result: dict[str, Any] = {
        "shape": shape,
        "shard_bytes": [shard.stat().st_size for shard in shards],
        "limit_bytes": int(1.5 * max(shard.stat().st_size for shard in shards) + GIB),
        "runs": {},
    }
    program = [sys.executable, "-m", "llm_emo"]
    result["runs"]["imports alone"] = watched(
        [sys.executable, "-c", "import llm_emo.convert"], folder / "log"
    )
    for name, source, target, to in (
        ("to native", "original", "native", "native"),
        ("to chatglm2", "native", "back", "chatglm2"),
    ):
        print(f"converting {name} ...", file=sys.stderr)
        result["runs"][name] = watched(
            [*program, "convert", str(folder / source), "-o", str(folder / target), "--to", to],
            folder / "log",
        )
    print("comparing ...", file=sys.stderr)
    result["bits_equal"] = equal(folder / "original", folder / "back")
    return result


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    shards = ", ".join(f"{size / GIB:.2f}" for size in result["shard_bytes"])
    total = sum(result["shard_bytes"])
    print(f"checkpoint: {total / 1e9:.2f} GB, float16, shards of {shards} GiB; {result['date']}")
    print(f"{result['machine']}; {result['versions']}\n")
    print(f"{'':16}{'seconds':>8}{'peak (VmHWM)':>14}{'own (RssAnon)':>15}{'mapped (RssFile)':>18}")
    for name, run in result["runs"].items():
        held = (f"{run[key] / GIB:.2f} GiB" for key in WATCHED)
        print(f"{name:16}{run['seconds']:8.1f}{next(held):>14}{next(held):>15}{next(held):>18}")
    print(f"\nlimit, 1.5 x the largest shard + 1 GiB: {result['limit_bytes'] / GIB:.2f} GiB")
    print(f"bits equal after there and back: {'yes' if result['bits_equal'] else 'NO'}")


def main() -> None:
    """Measure, print, and fail where a bit or the limit was broken."""
    given = arguments()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="llm-emo-convert-") as name:
        need = 3 * 2 * parameters(sizes(given.layers, given.small))
        if (free := shutil.disk_usage(name).free) < need:
            sys.exit(f"{name}: needs {need / GIB:.1f} GiB for three copies, {free / GIB:.1f} free")
        result = measure(given, Path(name))
    packages = ("torch", "safetensors", "transformers")
    result |= {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{package} {metadata.version(package)}" for package in packages),
    }
    show(result)
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    over = [n for n, run in result["runs"].items() if run["VmHWM"] > result["limit_bytes"]]
    if over or not result["bits_equal"]:
        sys.exit(f"failed: {', '.join(over) or 'bits differ'}")


if __name__ == "__main__":
    main()
