"""Training speed: this program beside other trainers, on the same batches.

    pip install -e .[bench] -c constraints.txt
    python scripts/bench/train.py --data-root DATA --recipe mastodon/lora

Every measurement is a process of its own, and the sides take turns (A B A B ...), so that a
machine that slows down slows all of them. What is timed runs from the end of one optimiser step
to the end of another: drawing and collating the batch, forward, backward, clipping, the
optimiser's step, and whatever the side does besides, such as this program's log.

The sides train one model, wrapped by this program, on rows that this program encoded, with the
arguments that this program gives to transformers. Sides that do not train the same thing are not
compared: before a side is timed, what its batches train is written down as pairs (tokens so far,
next token), which must be equal; and in float32 the first batch's losses must be equal.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

SIDES = {
    "llm_emo": "this program: one pass over the batch's token trie",
    "trl": "TRL's SFTTrainer: dynamic padding, its default",
    "trl_padding_free": "TRL's SFTTrainer with padding_free: one row, block-diagonal mask",
    "padded": "transformers' Trainer: dynamic padding, logits at every position",
}
OURS = "llm_emo"
WARM_UP = 1
"""Steps at the beginning of each measurement that are not counted."""
TOLERANCE = 1e-5
"""By which share the first losses may differ in float32.

In bfloat16 no such bound would tell right from wrong: rounding alone moves the loss of a batch
by 1e-2, and TRL's two modes differ about as much from each other.
"""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments; exits with 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description="Print examples/s of this program and of other trainers, and the ratios.",
        epilog="example: python scripts/bench/train.py --data-root DATA "
        "--recipe mastodon/lora --steps 12 --rounds 3 -o train.json; "
        "sides: " + "; ".join(f"{name} = {text}" for name, text in SIDES.items()),
    )
    parser.add_argument("--recipe", default="mastodon/lora", help="a recipe's name or file")
    parser.add_argument("--data-root", type=Path, help="the folder that holds the corpora")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a recipe's key, such as model.dtype=float32; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--peers", default="trl,trl_padding_free", metavar="A,B",
        help="whom to measure beside llm_emo, out of trl, trl_padding_free, padded "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=16, help="rows a step (default: 16)")
    parser.add_argument("--steps", type=int, default=12, help="timed steps a round (default: 12)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="which rows, in which order")
    parser.add_argument("-o", "--output", type=Path, help="also write everything to a JSON file")
    parser.add_argument(
        "--side", choices=SIDES, help="measure one side once and print its JSON, nothing else"
    )
    parser.add_argument("--round", type=int, default=0, help="with --side: which round")
    parser.add_argument(
        "--check", action="store_true",
        help="with --side: do not train, compute the first batch's loss in float32",
    )  # fmt: skip
    given = parser.parse_args(argv)
    given.peers = given.peers.split(",")
    if unknown := [name for name in given.peers if name not in SIDES or name == OURS]:
        known = ", ".join(name for name in SIDES if name != OURS)
        parser.error(f"--peers: unknown {', '.join(unknown)} (known: {known})")
    for name in ("batch_size", "steps", "rounds"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more")
    wanted = [given.side] if given.side else given.peers
    if any(name.startswith("trl") for name in wanted) and not importlib.util.find_spec("trl"):
        parser.error("TRL is not installed; pip install -e .[bench] -c constraints.txt")
    return given


# --- one side, in a process of its own ----------------------------------------------------------


def chosen(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """Return `count` random rows.

    Raises:
        RunError: there are not so many.
    """
    from llm_emo.errors import RunError

    if count > len(rows):
        raise RunError(
            f"{count} rows are wanted, but train has {len(rows)}; take fewer --steps, or a "
            "smaller --batch-size"
        )
    return random.Random(seed).sample(rows, count)


def trainer_of(
    side: str, model: Any, tokenizer: Any, rows: Sequence[Any], settings: Any, *,
    folder: Path, seed: int,
) -> Any:  # fmt: skip
    """Return the trainer of `side` over `rows`, an epoch of steps of `settings.batch_size`.

    Whichever side it is, step i takes the same rows.
    """
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from llm_emo.training import GlobalBatches, TrieTrainer, training_arguments
    from llm_emo.workflow import Progress

    batches = GlobalBatches(
        len(rows), batch_size=settings.batch_size, micro_batch_size=settings.micro_batch_size,
        seed=seed, rank=0, world=1,
    )  # fmt: skip
    own = training_arguments(
        folder, settings, accumulation=batches.accumulation, seed=seed, metric="none"
    )
    if side == OURS:
        trainer: TrieTrainer
        trainer = TrieTrainer(
            model, own, rows=rows, batches=batches,
            validate=lambda model: {"none": 0.0},  # behind the last step, off the clock
            callbacks=[Progress(folder / "log.jsonl", lambda: trainer.counts())],
        )  # fmt: skip
        return trainer

    shared: dict[str, Any] = {
        name: getattr(own, name)
        for name in (
            "output_dir", "num_train_epochs", "per_device_train_batch_size",
            "gradient_accumulation_steps", "learning_rate", "weight_decay", "lr_scheduler_type",
            "warmup_steps", "max_grad_norm", "optim", "gradient_checkpointing", "seed", "use_cpu",
            "disable_tqdm", "report_to",
        )
    }  # fmt: skip
    # The dataset below stands in the order of the program's batches already.
    shared |= {"train_sampling_strategy": "sequential", "logging_strategy": "no",
               "save_strategy": "no", "eval_strategy": "no"}  # fmt: skip
    ordered = [rows[index] for batch in batches for index in batch]
    if side == "padded":
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        return Trainer(
            model, TrainingArguments(**shared), train_dataset=labelled(ordered),
            data_collator=collator,
        )  # fmt: skip
    return sft_trainer(model, tokenizer, ordered, shared, padding_free=side == "trl_padding_free")


def labelled(rows: Sequence[Any]) -> Any:
    """Return rows as transformers wants them: ids, and labels that are -100 in the prompt."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "input_ids": [*row.prompt, *row.answer],
                "attention_mask": [1] * (len(row.prompt) + len(row.answer)),
                "labels": [-100] * len(row.prompt) + list(row.answer),
            }
            for row in rows
        ]
    )


def sft_trainer(
    model: Any, tokenizer: Any, rows: Sequence[Any], shared: Mapping[str, Any], *,
    padding_free: bool,
) -> Any:  # fmt: skip
    """Return TRL's trainer, set up as fast as its documentation allows for this work.

    A tokenised prompt-completion dataset with completion-only loss; no gradient checkpointing
    (its default costs about a fifth of the speed) and no autocast (the weights have the dtype
    that both sides train in).
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    dataset = Dataset.from_list(
        [
            {
                "input_ids": [*row.prompt, *row.answer],
                "completion_mask": [0] * len(row.prompt) + [1] * len(row.answer),
            }
            for row in rows
        ]
    )
    config = SFTConfig(
        **shared,
        completion_only_loss=True,
        packing=False,  # it would put other rows together than the batch's
        padding_free=padding_free,
        max_length=None,  # rows were shortened by the program
        bf16=False,
    )
    return SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)


def trained(batch: Mapping[str, Any]) -> Counter[tuple[tuple[int, ...], int]]:
    """Return what a collated batch trains: (tokens so far, next token), with multiplicity."""
    if "trie" in batch:
        trie = batch["trie"]
        paths: dict[int, tuple[int, ...]] = {}  # node -> the tokens up to and with it
        for nodes, length in zip(trie.nodes.tolist(), trie.lengths.tolist(), strict=True):
            tokens = tuple(trie.tokens[nodes[:length]].tolist())
            paths |= {node: tokens[: at + 1] for at, node in enumerate(nodes[:length])}
        at = batch["nodes"][batch["where"]].tolist()
        return Counter(
            (paths[node], label)
            for node, label in zip(at, batch["labels"].tolist(), strict=True)
            if label != -100
        )
    pairs: Counter[tuple[tuple[int, ...], int]] = Counter()
    for ids, labels in _rows(batch):
        pairs.update((tuple(ids[:at]), label) for at, label in enumerate(labels) if label != -100)
    return pairs


def _rows(batch: Mapping[str, Any]) -> Iterable[tuple[list[int], list[int]]]:
    """Yield the rows (ids, labels) of a padded or of a flattened batch, without padding."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "attention_mask" in batch:
        for row, own, mask in zip(ids, labels, batch["attention_mask"].bool(), strict=True):
            yield row[mask].tolist(), own[mask].tolist()
        return
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    for start, end in itertools.pairwise(starts):
        yield ids[0, start:end].tolist(), labels[0, start:end].tolist()


def tokens_in(batch: Mapping[str, Any]) -> int:
    """Return how many tokens the transformer runs for a batch, padding included."""
    return len(batch["trie"]) if "trie" in batch else int(batch["input_ids"].numel())


def timed(trainer: Any) -> tuple[list[float], list[float]]:
    """Train; return the seconds from each step's end to the next one's, and all the losses."""
    import torch
    from transformers import TrainerCallback

    ends: list[float] = []
    losses: list[Any] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    step = trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        losses.append(step(*args, **kwargs))
        return losses[-1]

    trainer.training_step = recorded
    trainer.add_callback(Clock())
    trainer.train()
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    return seconds, [float(loss) for loss in losses]


def loss_of(trainer: Any, batch: Mapping[str, Any], targets: int) -> float:
    """Return the mean loss of a batch's targets, as the trainer computes it."""
    import torch

    trainer.model.train()
    with torch.no_grad():
        inputs = trainer._prepare_inputs(batch)
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(targets))
    return float(loss)


def forget_peak() -> None:
    """Let the peak of memory begin here, where the system can; loading a model has its own."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def peak_memory() -> int:
    """Return the most memory this process held, in bytes; on a GPU, the GPU's."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Measure `given.side` in this process, or with `given.check` its first loss only.

    Raises:
        EmoError: recipe, data and model do not fit, or TRL cannot train the method.
    """
    import torch

    from llm_emo import recipes, runs
    from llm_emo.errors import RecipeError
    from llm_emo.experiment import Experiment, data_root
    from llm_emo.labelling import open_labeller

    sizes = (f"train.{key}={given.batch_size}" for key in ("batch_size", "micro_batch_size"))
    fixed = ("train.epochs=1", "train.gradient_checkpointing=false")
    dtype = ("model.dtype=float32",) if given.check else ()
    recipe = recipes.load(given.recipe, [*given.overrides, *sizes, *fixed, *dtype])
    if not isinstance(recipe.method, recipes.Lora) or recipe.train is None:
        raise RecipeError(
            f"{given.recipe}: method.kind is {recipe.method.kind}; SFTTrainer and this program "
            "have only lora in common, so take a recipe with lora"
        )
    if recipe.method.dropout:
        raise RecipeError(
            f"{given.recipe}: method.dropout is {recipe.method.dropout}, and random masks make "
            "losses incomparable; add --set method.dropout=0"
        )
    experiment = Experiment.prepare(recipe, data_root(given.data_root))
    labeller = open_labeller(experiment)
    rows = chosen(
        labeller.encoder.encode(experiment.examples("train")),
        given.batch_size * (WARM_UP + given.steps),
        given.seed + given.round,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(
            given.side, labeller.model, labeller.base.tokenizer, rows, recipe.train,
            folder=Path(folder), seed=recipe.seed,
        )  # fmt: skip
        batches = list(trainer.get_train_dataloader())
        pairs = [sorted(trained(batch).items()) for batch in batches]
        tokens = [tokens_in(batch) for batch in batches[WARM_UP:]]
        if given.check:
            targets = sum(count for _, count in pairs[0])
            return {"side": given.side, "loss": loss_of(trainer, batches[0], targets)}
        del batches
        gc.collect()
        forget_peak()
        before = peak_memory()
        seconds, losses = timed(trainer)
    counted = seconds[WARM_UP - 1 :]
    environment = runs.environment(None, experiment)
    del environment["data_root"], environment["run"]
    environment["versions"]["trl"] = metadata.version("trl") if "trl" in sys.modules else None
    return {
        "side": given.side,
        "round": given.round,
        "examples_per_second": given.batch_size * given.steps / sum(counted),
        "seconds_per_step": counted,
        "losses": losses,
        "trained": hashlib.sha256(repr(pairs).encode()).hexdigest(),
        "targets": sum(count for batch in pairs for _, count in batch),
        "tokens_per_step": sum(tokens) / len(tokens),
        "tokens_of_rows_per_step": sum(
            len(row.prompt) + len(row.answer) for row in rows
        ) / (WARM_UP + given.steps),
        "peak_memory_bytes": peak_memory(),
        "peak_memory_before_training_bytes": before,
        "threads": torch.get_num_threads(),
        "dtype": labeller.base.dtype,
        "device": str(labeller.base.model.device),
        "method": recipe.method.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json"),
        "protocol": experiment.protocol.name,
        "environment": environment,
    }  # fmt: skip


# --- all sides in turn --------------------------------------------------------------------------


def run_side(argv: Sequence[str], side: str, *options: str) -> dict[str, Any]:
    """Measure one side once in a process of its own; exits as that process did."""
    command = [sys.executable, __file__, *argv, "--side", side, *options]
    # TRL reports each trainer that is made to the hub; a benchmark is no usage.
    environment = os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SystemExit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def require_same(
    losses: Mapping[str, float], results: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Refuse to compare sides that trained different things.

    Raises:
        JobFailed: a peer's first loss in float32 is another, or its tokens or targets were.
    """
    from llm_emo.errors import JobFailed

    for peer, loss in losses.items():
        if not math.isclose(loss, losses[OURS], rel_tol=TOLERANCE):
            raise JobFailed(
                f"the first loss in float32 is {loss:.6f} in {peer} and {losses[OURS]:.6f} in "
                f"{OURS}; they train different things"
            )
    for peer, rounds in results.items():
        for own, other in zip(results[OURS], rounds, strict=True):
            if own["trained"] != other["trained"]:
                raise JobFailed(f"{peer} trained on other tokens or targets than {OURS}")


def ratios(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[float]]:
    """Return, for each peer, this program's rate over the peer's, round by round."""
    return {
        peer: [
            own["examples_per_second"] / other["examples_per_second"]
            for own, other in zip(results[OURS], rounds, strict=True)
        ]
        for peer, rounds in results.items()
        if peer != OURS
    }


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the rates, tokens and memory of all sides, one line a side."""
    lines = [f"{'':18}{'examples/s':>11}{'min':>8}{'max':>8}{'tokens/step':>13}{'peak memory':>14}"]
    for side, rounds in results.items():
        rates = [result["examples_per_second"] for result in rounds]
        tokens = statistics.mean(result["tokens_per_step"] for result in rounds)
        memory = max(result["peak_memory_bytes"] for result in rounds) / 2**20
        lines.append(
            f"{side:18}{statistics.median(rates):11.2f}{min(rates):8.2f}{max(rates):8.2f}"
            f"{tokens:13.0f}{memory:10.0f} MiB"
        )
    return "\n".join(lines)


def report(
    losses: Mapping[str, float],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    given: argparse.Namespace,
) -> str:
    """Return everything that is printed."""
    one = results[OURS][0]
    machine = one["environment"]
    versions = {
        name: version
        for rounds in results.values()  # only TRL's own processes know its version
        for name, version in rounds[0]["environment"]["versions"].items()
        if version is not None
    }
    shown = [name for name in ("torch", "transformers", "peft", "trl") if name in versions]
    lines = [
        f"{given.recipe}: {machine['model']}, {one['method']['kind']} rank "
        f"{one['method']['rank']}, {one['dtype']} on {one['device']}, batch {given.batch_size}, "
        "completion-only loss",
        f"{given.rounds} rounds of {given.steps} steps after {WARM_UP} for warming up; "
        f"seed {given.seed}; {machine['started']}",
        f"{machine['cpu'] or platform.machine()}, {machine['cores']} cores, "
        f"{one['threads']} threads; " + ", ".join(f"{name} {versions[name]}" for name in shown),
        "",
        table(results),
    ]
    own = statistics.mean(result["tokens_of_rows_per_step"] for result in results[OURS])
    lines += ["", f"{own:.0f} tokens in a step's rows, without padding and without sharing"]
    targets = sum(result["targets"] for result in results[OURS])
    lines.append(f"{targets} targets, the same after the same tokens on every side")
    for peer, values in ratios(results).items():
        each = ", ".join(f"{value:.2f}" for value in values)
        apart = max(
            abs(a["losses"][0] - b["losses"][0])
            for a, b in zip(results[OURS], results[peer], strict=True)
        )
        lines.append(
            f"{OURS} / {peer}: {statistics.median(values):.2f}x (rounds: {each}); first losses "
            f"differ by {abs(losses[peer] - losses[OURS]):.1e} in float32"
            + (f", {apart:.1e} in {one['dtype']}" if one["dtype"] != "float32" else "")
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    from llm_emo.errors import EmoError
    from llm_emo.runs import write_json

    argv = sys.argv[1:] if argv is None else argv
    given = arguments(argv)
    try:
        if given.side:
            print(json.dumps(measure(given)))
            return 0
        sides = (OURS, *given.peers)
        print("checking that all sides have the same loss in float32", file=sys.stderr, flush=True)
        losses = {side: run_side(argv, side, "--check")["loss"] for side in sides}
        results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        require_same(losses, results)
        for turn in range(given.rounds):
            for side in sides:
                result = run_side(argv, side, "--round", str(turn))
                results[side].append(result)
                print(
                    f"round {turn + 1}: {side}: {result['examples_per_second']:.2f} examples/s",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
        require_same(losses, results)
        if given.output:
            content = {
                "command": shlex.join(["scripts/bench/train.py", *argv]), "seed": given.seed,
                "first_loss_in_float32": losses, "ratios": ratios(results), "results": results,
            }  # fmt: skip
            write_json(given.output, content)
        print(report(losses, results, given))
    except EmoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
