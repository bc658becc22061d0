#!/usr/bin/env python
"""Check a CUDA machine: ChatGLM2-6B's shape under a cap of memory, trie beside padded batches.

    python scripts/gpu/check.py --json gpu.json

No weights and no corpora are needed: the model has random weights, made on the device, and rows
have the recorded lengths of Friends and SST-5. Every part runs in a process of its own; a part
that fails is recorded as failed, with its reason, and the others go on.
"""

import argparse
import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# What is measured is the code beside this script, installed or not.
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

EXAMPLES = """\
examples:
  python scripts/gpu/check.py --tiny                  does everything run here? (two minutes)
  python scripts/gpu/check.py --json gpu.json         everything, as for a card of 24 GiB
  python scripts/gpu/check.py --cap 15 --parts lora/nf4,answers/nf4 --corpora friends
  python scripts/gpu/check.py --data-root DATA --tokenizer tokenizer.model --json gpu.json
  python scripts/gpu/check.py --device cpu --tiny     without a GPU: runs, but measures nothing

parts:
  exact              float32, small model: loss, gradients, trainer, generation and scoring,
                     through the trie and from padded rows, on this device and on the CPU
  lora/bf16          training with the reference recipes' LoRA (rank 8)
  p_tuning_v2/bf16   training with the reference recipes' P-Tuning v2 (prefix 32)
  lora/nf4, p_tuning_v2/nf4    the same on a 4-bit base
  answers/bf16, answers/nf4    generation, and scoring of the labels

exit codes: 0 every part was measured (a padded batch that does not fit into the cap is a
measurement), 1 a part failed or a check of `exact` did not hold, 2 wrong usage or no CUDA.
"""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments; exits with 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description="Measure memory, speed and exactness of a ChatGLM2-6B with random weights on "
        "this machine's GPU: the token trie beside padded batches of the same rows.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="also write everything to FILE, part by part")
    add("--parts", metavar="A,B", help="which parts (default: all)")
    add("--corpora", default="friends,sst5", metavar="A,B",
        help="whose rows, out of friends, sst5 (default: both)")  # fmt: skip
    add("--cap", type=float, default=24.0, metavar="GIB",
        help="memory that may be used, in GiB (default: 24)")  # fmt: skip
    add("--batch", type=int, help="rows of a batch (default: 16)")
    add("--rounds", type=int, help="turns of each side (default: 3)")
    add("--steps", type=int, help="timed batches of a turn (default: 8)")
    add("--warm-up", type=int, default=1, help="untimed batches of a turn (default: 1)")
    add("--new-tokens", type=int, help="tokens that generation writes (default: 16)")
    add("--minutes", type=float, default=5.0,
        help="bound for the turns of one measurement; a slow device gets shorter turns "
        "(default: 5)")  # fmt: skip
    add("--limit", type=float, default=45.0, metavar="MINUTES",
        help="a part that takes longer is ended (default: 45)")  # fmt: skip
    add("--seed", type=int, default=0, help="of weights, rows and adapters (default: 0)")
    add("--data-root", type=Path, help="folder with the corpora: take real rows (default: rows "
        "of random ids with the corpora's recorded lengths)")  # fmt: skip
    add("--tokenizer", type=Path, help="with --data-root: ChatGLM2's tokenizer.model, or a folder "
        "that `llm-emo convert` wrote")  # fmt: skip
    add("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    add(
        "--tiny",
        action="store_true",
        help="a tiny shape and few steps: shows that everything runs; its figures mean nothing",
    )
    add("--child", metavar="A,B", help=argparse.SUPPRESS)  # parts, one process, JSON lines
    given = parser.parse_args(argv)
    given.parts = _names(parser, "--parts", given.parts, PARTS)
    given.corpora = _names(parser, "--corpora", given.corpora, CORPORA)
    for name, full, tiny in (
        ("batch", 16, 4), ("rounds", 3, 2), ("steps", 8, 1), ("new_tokens", 16, 4),
    ):  # fmt: skip
        if getattr(given, name) is None:
            setattr(given, name, tiny if given.tiny else full)
    for name in ("batch", "rounds", "steps", "new_tokens"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more")
    if given.warm_up < 0:
        parser.error("--warm-up: expected 0 or more")
    for name in ("cap", "minutes", "limit"):
        if not getattr(given, name) > 0:
            parser.error(f"--{name}: expected more than 0")
    if (given.data_root is None) != (given.tokenizer is None):
        parser.error("--data-root and --tokenizer belong together: real rows need both")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        parser.error(f"--json: no folder {given.json.absolute().parent}")
    kind, _, index = given.device.partition(":")
    if kind not in ("cuda", "cpu") or (index and (kind == "cpu" or not index.isdigit())):
        parser.error(f"--device: found {given.device}, expected cuda, cuda:N or cpu")
    if kind == "cpu" and not given.tiny:
        parser.error("--device cpu: the 6B shape is for a GPU; add --tiny")
    return given


PARTS = (
    "exact", "lora/bf16", "p_tuning_v2/bf16", "lora/nf4", "p_tuning_v2/nf4", "answers/bf16",
    "answers/nf4",
)  # fmt: skip
CORPORA = ("friends", "sst5")


def _names(
    parser: argparse.ArgumentParser, option: str, given: str | None, known: Sequence[str]
) -> tuple[str, ...]:
    names = known if given is None else [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{option}: unknown {', '.join(unknown)} (known: {', '.join(known)})")
    return tuple(name for name in known if name in names)


def missing_cuda(device: str) -> str | None:
    """Return why there is no such device, or None."""
    if device == "cpu":
        return None
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is built without CUDA; install a build with it (see "
            "https://pytorch.org), or try the script without a GPU: --device cpu --tiny"
        )
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no GPU: no driver, one that is too old, or an empty "
            "CUDA_VISIBLE_DEVICES (see nvidia-smi); without a GPU: --device cpu --tiny"
        )
    index = int(device.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        return f"--device {device}: there are {torch.cuda.device_count()} GPUs, counted from 0"
    return None


# --- the parts, in a process of their own -------------------------------------------------------


def child(given: argparse.Namespace, emit: Callable[[dict[str, Any]], None]) -> int:
    """Run the parts of `given.child`; emit what each measured; return the exit code.

    The process ends at the first failure, because a device error may spoil what comes after it;
    the parent goes on with the parts that are left in a new one.
    """
    from gpu_check import machine, parts
    from gpu_check.turns import is_out_of_memory, say

    from llm_emo.errors import EmoError

    names = ("tiny", "batch", "rounds", "steps", "warm_up", "new_tokens", "minutes", "seed",
             "corpora", "data_root", "tokenizer")  # fmt: skip
    settings = parts.Settings(
        device="cpu" if given.device == "cpu" else "cuda:0",  # all others are hidden
        cap_gib=given.cap,
        **{name: getattr(given, name) for name in names},
    )
    import torch

    if given.device == "cpu":
        torch.set_num_threads(1)  # tiny matrices: further threads only wait
    gc.freeze()  # what imports left takes a second to walk, in the middle of a step or between two

    def keep(part: str) -> parts.Keep:
        return lambda partial: emit({"part": part, "partial": partial})

    for part in given.child.split(","):
        say(f"{part} ...")
        reason: dict[str, Any]
        try:
            emit({"machine": machine.facts(torch.device(settings.device))})
            emit({"part": part, "result": parts.run(part, settings, keep(part))})
            continue
        except ImportError as error:
            reason = {"status": "not available", "reason": str(error)}
        except EmoError as error:
            reason = {"status": "failed", "reason": str(error)}
        except Exception as error:
            traceback.print_exc()
            memory = is_out_of_memory(error)
            reason = {
                "status": "out of memory" if memory else "failed",
                "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
                "traceback": traceback.format_exc().splitlines()[-12:],
            }
        emit({"part": part, "result": reason})
        return 1
    return 0


def environment(device: str, own: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process that sees this device only, and no network.

    Shown several devices, transformers would spread training over all of them.
    """
    hidden = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        return {**own, **hidden, "CUDA_VISIBLE_DEVICES": ""}
    index = int(device.partition(":")[2] or 0)
    names = [name.strip() for name in own.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    name = names[index] if names[0] else str(index)
    return {**own, **hidden, "CUDA_VISIBLE_DEVICES": name}


def run_child(
    argv: Sequence[str], parts: Sequence[str], given: argparse.Namespace,
    take: Callable[[dict[str, Any]], None],
) -> str | None:  # fmt: skip
    """Run parts in one process, passing on what it emits; return how it ended, if badly."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "check.py"), *argv, "--child", ",".join(parts)],
        stdout=subprocess.PIPE, text=True, env=environment(given.device, os.environ),
    )  # fmt: skip
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    watch = threading.Timer(60 * given.limit * len(parts), end)
    watch.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                message = json.loads(line)
            except ValueError:  # a library wrote to stdout
                sys.stderr.write(line)
                continue
            take(message)
        code = process.wait()
    finally:
        watch.cancel()
        process.kill()
        process.wait()
    if late.is_set():
        return f"ended after --limit {given.limit:g} minutes"
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}; its messages are above"
    return f"the process ended with exit code {code}; its messages are above" if code else None


def run_parts(
    argv: Sequence[str], given: argparse.Namespace, record: dict[str, Any],
    save: Callable[[], None],
) -> None:  # fmt: skip
    """Run all parts that are asked for; fill `record` and save it as they come."""
    done: dict[str, Any] = record["parts"]
    finished: set[str] = set()

    def take(message: dict[str, Any]) -> None:
        part = message.get("part")
        if part is None:
            record["machine"] = message["machine"]
        elif "partial" in message:  # what a crash would leave
            done[part] = {"status": "failed", **message["partial"]}
        else:
            done[part] = done.get(part, {}) | message["result"]
            finished.add(part)
        save()

    left = list(given.parts)
    while left:
        # A tiny shape leaves nothing behind, and most of its time would be imports.
        share = left if given.tiny else left[:1]
        ended = run_child(argv, share, given, take)
        unfinished = [part for part in share if part not in finished]
        # A process ends behind a part that failed, and says so; else the part it was in ended it.
        said = any(done[part]["status"] != "measured" for part in share if part in finished)
        if unfinished and not said:
            lost, reason = unfinished[0], ended or "the process ended without a word"
            take({"part": lost, "result": {"status": "failed", "reason": reason}})
            print(f"{lost}: {reason}", file=sys.stderr)
        left = [part for part in left if part not in finished]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    given = arguments(argv)
    if given.child:
        # Libraries print to stdout, which belongs to the parent.
        wire = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

        def emit(message: dict[str, Any]) -> None:
            wire.write(json.dumps(message) + "\n")
            wire.flush()

        return child(given, emit)
    if reason := missing_cuda(given.device):
        print(f"error: no CUDA device: {reason}", file=sys.stderr)
        return 2
    return checked(argv, given)


def checked(argv: Sequence[str], given: argparse.Namespace) -> int:
    """Run the parts, write the record, print the table; return the exit code."""
    from gpu_check import table, versions

    from llm_emo.errors import EmoError
    from llm_emo.runs import write_json

    record: dict[str, Any] = {
        "command": shlex.join(["scripts/gpu/check.py", *argv]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": None,
        "versions": versions.versions(),
        "machine": None,
        "settings": {
            name: value if not isinstance(value, Path) else str(value)
            for name, value in vars(given).items()
            if name not in ("child", "json", "data_root", "tokenizer")
        },
        "parts": {},
    }

    def save() -> None:
        if given.json is not None:
            write_json(given.json, record)

    try:
        save()  # a file that cannot be written is better known now, and so is a missing corpus
        if given.data_root is not None:
            from gpu_check import rows

            for corpus in given.corpora:
                rows.draw(
                    corpus, given.batch * given.rounds * given.steps, seed=given.seed,
                    root=given.data_root, tokenizer=given.tokenizer,
                )  # fmt: skip
        run_parts(argv, given, record, save)
        record["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        save()
    except KeyboardInterrupt:
        print("\nstopped; what was measured until now:", file=sys.stderr)
        print(table.text(record))
        return 130
    except EmoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table.text(record))
    return 0 if table.good(record) else 1


if __name__ == "__main__":
    raise SystemExit(main())
