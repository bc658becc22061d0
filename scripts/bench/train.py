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
import importlib
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from common import harness, llama_factory, matrix, trainers
from common.harness import OURS, Result, Rounds
from common.trainers import PEERS, SIDES

RATE = "examples_per_second"
WARM_UP = 2
"""Steps at the beginning of each measurement that are not counted; see `warmed_up`."""
TOLERANCE = 1e-5
"""By which share the first losses may differ in float32.

In bfloat16 no such bound would tell right from wrong: rounding alone moves the loss of a batch
by 1e-2, and TRL's two modes differ about as much from each other.
"""
SHOWN = ("torch", "transformers", "peft", "trl", "llamafactory")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments; exits with 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description="Print examples/s of this program and of other trainers, the ratios, and the "
        "share of the machine's matrix-product rate that each reaches.",
        epilog="example: python scripts/bench/train.py --data-root DATA "
        "--recipe mastodon/lora --steps 12 --rounds 3 -o train.json",
    )
    harness.add_recipe(parser, "mastodon/lora")
    usual = "; ".join(f"for {kind} {','.join(peers)}" for kind, peers in PEERS.items())
    harness.add_peers(parser, SIDES, None, usual)
    parser.add_argument(
        "--batch-size", type=harness.positive, default=16, help="rows a step (default: 16)"
    )
    parser.add_argument(
        "--steps", type=harness.positive, default=12, help="timed steps a round (default: 12)"
    )
    parser.add_argument(
        "--by", choices=("row", "dialogue"),
        help="what a step is filled with (default: what the recipe's train.batch_by says)",
    )  # fmt: skip
    check = "do not train, compute the first batch's loss in float32"
    harness.add_common(parser, sides=SIDES, check=check)
    parser.add_argument(
        "--profile", action="store_true",
        help="compare nothing: print where the time of this program's step goes, by operation",
    )  # fmt: skip
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# --- one side, in a process of its own ----------------------------------------------------------


def recipe_of(given: argparse.Namespace) -> Any:
    """Return the recipe at the batch size that is measured.

    Raises:
        RecipeError: the recipe trains nothing that has a peer, or draws random masks.
    """
    from llm_emo import recipes
    from llm_emo.errors import RecipeError

    sizes = (f"train.{key}={given.batch_size}" for key in ("batch_size", "micro_batch_size"))
    fixed = ["train.epochs=1", "train.gradient_checkpointing=false"]
    if given.by:
        fixed.append(f"train.batch_by={given.by}")
    dtype = ("model.dtype=float32",) if given.check else ()
    recipe = recipes.load_llm(given.recipe, [*given.overrides, *sizes, *fixed, *dtype])
    kind = recipe.method.kind
    if kind not in PEERS:
        raise RecipeError(
            f"{given.recipe}: method.kind is {kind}; peers train {' or '.join(PEERS)}, so take a "
            "recipe with one of these"
        )
    train = recipe.train
    if train and (train.optimizer != "adamw" or train.betas or train.imbalance):
        raise RecipeError(
            f"{given.recipe}: peers train AdamW at its own rates and without a remedy for rare "
            "classes; add --set train.optimizer=adamw --set train.betas=null "
            "--set train.imbalance=null"
        )
    if isinstance(recipe.method, recipes.Lora | recipes.PTuningV2) and recipe.method.dropout:
        raise RecipeError(
            f"{given.recipe}: method.dropout is {recipe.method.dropout}, and random masks make "
            "losses incomparable; add --set method.dropout=0"
        )
    return recipe


def peers_for(given: argparse.Namespace, kind: str) -> list[str]:
    """Return whom to measure.

    Raises:
        RunError: a peer does not train this method, or is not installed.
    """
    from llm_emo.errors import RunError

    peers = list(PEERS[kind]) if given.peers is None else given.peers
    for peer in peers:
        if (peer == "peft_prefix") != (kind == "p_tuning_v2"):
            raise RunError(f"--peers: {peer} does not train method {kind}; leave it out")
        trainers.require(peer)
    return list(peers)


def prepared(given: argparse.Namespace) -> tuple[Any, Any, trainers.Steps]:
    """Return the recipe, its labeller and the steps of rows that this round trains."""
    from llm_emo.experiment import dialogues_of

    recipe = recipe_of(given)
    labeller = harness.opened(given, recipe)
    experiment = labeller.experiment
    steps = trainers.drawn(
        labeller.encoder.encode(experiment.examples("train")), recipe.train,
        given.steps, given.seed + given.round, dialogues_of(experiment),
    )  # fmt: skip
    return recipe, labeller, warmed_up(steps)


def warmed_up(steps: trainers.Steps) -> trainers.Steps:
    """Put in front, once more, the steps that are largest: padded, and without repetition.

    A process whose step is larger than any before asks the system for memory, which may take as
    long as the step. In a whole training that happens a few times; in a dozen of steps it would
    be a part of what is measured.
    """
    from llm_emo.trie import TokenTrie

    def padded(step: Sequence[Any]) -> int:
        return len(step) * max(len(row.prompt) + len(row.answer) for row in step)

    def distinct(step: Sequence[Any]) -> int:
        return len(TokenTrie.build([row.prompt + row.answer for row in step]))

    return [max(steps, key=padded), max(steps, key=distinct), *steps]


def measure(given: argparse.Namespace) -> Result:
    """Measure `given.side` in this process, or with `given.check` its first loss only.

    Raises:
        EmoError: recipe, data and model do not fit, or the side cannot train the method.
    """
    recipe, labeller, steps = prepared(given)
    if given.prepare:
        kept = steps[:1] if given.check else steps
        llama_factory.prepare(given.prepare, recipe, kept, WARM_UP)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainers.trainer_of(
            given.side, labeller.model, labeller.base.tokenizer, steps, recipe.train,
            folder=Path(folder), seed=recipe.seed,
        )  # fmt: skip
        batches = trainers.batches(trainer)
        pairs = trainers.fingerprint(batches)
        targets = [trainers.trained(batch).total() for batch in batches]
        tokens = [trainers.tokens_in(batch) for batch in batches[WARM_UP:]]
        if given.check:
            loss = trainers.loss_of(trainer, batches[0], targets[0])
            return {"side": given.side, "loss": loss}
        del batches
        # On our side only: the rate belongs to the machine, at that time, and the operations to
        # the rows; both hold for every side of the round.
        needed, limit = {}, None
        if given.side == OURS:
            needed = matrix.of_training(labeller.model, recipe, steps[WARM_UP:])
            limit = matrix.products_of_training(labeller.model, needed)
        products: list[float] = []
        # The machine's rate belongs to a moment, so it is taken in turns with the steps.
        between = (lambda: products.append(limit.seconds())) if limit else None
        harness.forget_peak()
        before = harness.peak_memory()
        seconds, losses = trainers.timed(trainer, between)
    counted = seconds[WARM_UP - 1 :]
    return {
        **harness.described(given, labeller, *SHOWN),
        RATE: given.batch_size * given.steps / sum(counted),
        "seconds_per_step": counted,
        "losses": losses,
        "trained": pairs,
        "targets": sum(targets),
        "tokens_per_step": statistics.mean(tokens),
        "tokens_of_rows_per_step": statistics.mean(
            sum(len(row.prompt) + len(row.answer) for row in step) for step in steps[WARM_UP:]
        ),
        "peak_memory_bytes": harness.peak_memory(),
        "peak_memory_before_training_bytes": before,
        "matrix": needed | limit.rate(products[WARM_UP:]) if limit else None,
        "method": recipe.method.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json"),
        "protocol": labeller.experiment.protocol.name,
    }


LOOPS = (
    ("native_attention", "attend", "attention, in compiled loops"),
    ("native_attention", "attend_backward", "attention, in compiled loops"),
    ("native_lora", "lora", "LoRA, in compiled loops"),
    ("native_lora", "lora_backward", "LoRA, in compiled loops"),
)
"""Modules, functions, and what the profiler is to call these; it sees torch's operations only."""


def labelled(module: str, function: str, kind: str) -> Any:
    """Return what makes the profiler see a function, while entered."""
    from torch.profiler import record_function

    plain = getattr(importlib.import_module(f"llm_emo.{module}"), function)

    def seen(*arguments: Any, **keywords: Any) -> Any:
        with record_function(kind):
            return plain(*arguments, **keywords)

    return mock.patch(f"llm_emo.{module}.{function}", seen)


def kind_of(
    name: str, shapes: Sequence[Sequence[int]], vocabulary: int, ranks: Set[int]
) -> tuple[str, float]:
    """Return what an operation of a step serves, and how many operations a product does.

    Args:
        name: As torch's profiler calls it.
        shapes: Of its inputs.
        vocabulary: The head's outputs.
        ranks: A side of every product of an adapter.
    """
    if name in {kind for _, _, kind in LOOPS}:
        return name, 0.0
    if name == "mkldnn::_linear_pointwise":  # by a copy of a frozen weight
        kind = "the head" if vocabulary in shapes[1] else "frozen layers"
        return f"products of {kind}", 2.0 * math.prod(shapes[0]) * shapes[1][0]
    short = name.removeprefix("aten::").rstrip("_")
    if short not in ("mm", "addmm", "bmm", "baddbmm"):
        return "all else", 0.0
    first, second = shapes[1:3] if "add" in short else shapes[:2]
    done = 2.0 * math.prod(first) * second[-1]
    if "bmm" in short:
        return "products of attention", done
    sizes = (*first, second[-1])
    if vocabulary in sizes:
        return "products of the head", done
    if not ranks.isdisjoint(sizes):
        return "products of the adapter", done
    return "products of frozen layers", done


def by_kind(events: Sequence[Any], vocabulary: int, ranks: Set[int]) -> str:
    """Return what a step's time went to, as a table, and what would be left without `all else`."""
    spent: dict[str, list[float]] = {}
    for event in events:
        kind, done = kind_of(event.key, event.input_shapes, vocabulary, ranks)
        time = event.self_cpu_time_total + event.self_device_time_total
        entry = spent.setdefault(kind, [0.0, 0.0])
        entry[0] += time / 1e6
        entry[1] += done * event.count
    total = sum(seconds for seconds, _ in spent.values())
    rows = [
        [kind, f"{seconds / total:.1%}", f"{done / seconds / 1e9:.0f} GFLOP/s" if done else ""]
        for kind, (seconds, done) in sorted(spent.items(), key=lambda item: -item[1][0])
    ]
    left = 1 - spent.get("all else", [0.0])[0] / total
    return "\n".join(
        [
            harness.columns(["time", "share", "rate"], rows),
            f"were all else free, a step would be {1 / left:.2f} times as fast; the profiler slows "
            "what is small, so it is less",
        ]
    )


def profile(given: argparse.Namespace) -> str:
    """Return what a forward and a backward pass of this program spend their time on."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from llm_emo.training import answer_loss, collate

    _, labeller, steps = prepared(given)
    model = labeller.model.train()
    activities = [ProfilerActivity.CPU]
    if labeller.base.model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for step in steps[:WARM_UP]:
        answer_loss(model, collate(step)).backward()
    with contextlib.ExitStack() as inside:
        for module, function, kind in LOOPS:
            inside.enter_context(labelled(module, function, kind))
        found = inside.enter_context(profiler(activities=activities, record_shapes=True))
        for step in steps[WARM_UP:]:
            answer_loss(model, collate(step)).backward()
    table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
    events = found.key_averages(group_by_input_shape=True)
    layers, head = matrix.linears(model)
    # Of one projection, or of all that read one input.
    ranks = {layer.rank * count for layer in layers for count in (1, 2, 3)}
    kinds = by_kind(events, head.outputs, ranks)
    heading = f"{given.recipe}: {len(steps) - WARM_UP} steps in {labeller.base.dtype}"
    return "\n".join([heading, table, kinds])


# --- all sides in turn --------------------------------------------------------------------------


def require_same(losses: Mapping[str, float], results: Rounds) -> None:
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


def report(losses: Mapping[str, float], results: Rounds, given: argparse.Namespace) -> str:
    """Return everything that is printed."""
    one = results[OURS][0]
    method = one["method"]
    size = f"rank {method['rank']}" if "rank" in method else f"prefix {method['prefix_length']}"
    lines = [
        f"{given.recipe}: {one['model']}, {method['kind']} {size}, {one['dtype']} on "
        f"{one['device']}, batch {given.batch_size}, completion-only loss",
        f"{given.rounds} rounds of {given.steps} steps after {WARM_UP} for warming up; "
        f"seed {given.seed}",
        *harness.machine_lines(results, *SHOWN),
        "",
        harness.rates_table(
            results,
            RATE,
            ("tokens/step", lambda result: f"{result['tokens_per_step']:.0f}"),
        ),
        "",
        *matrix_lines(results[OURS]),
    ]
    own = statistics.mean(result["tokens_of_rows_per_step"] for result in results[OURS])
    lines.append(f"{own:.0f} tokens in a step's rows, without padding and without sharing")
    targets = sum(result["targets"] for result in results[OURS])
    lines.append(f"{targets} targets, the same after the same tokens on every side")
    for peer, values in harness.ratios(results, RATE).items():
        apart = max(
            abs(a["losses"][0] - b["losses"][0])
            for a, b in zip(results[OURS], results[peer], strict=True)
        )
        memory = [
            max(result["peak_memory_bytes"] for result in results[side]) for side in (OURS, peer)
        ]
        lines.append(
            f"{harness.ratio_line(peer, values)}, {memory[0] / memory[1]:.0%} of its memory; "
            f"first losses differ by {abs(losses[peer] - losses[OURS]):.1e} in float32"
            + (f", {apart:.1e} in {one['dtype']}" if one["dtype"] != "float32" else "")
        )
    return "\n".join(lines)


def matrix_lines(rounds: Sequence[Result]) -> list[str]:
    """Return the lines on the machine's rate and on what a step needs."""
    rates = [result["matrix"]["operations_per_second"] / 1e9 for result in rounds]
    kinds = rounds[0]["matrix"]["operations"]
    steps = len(rounds[0]["matrix"]["nodes"])
    total = sum(kinds.values())
    parts = ", ".join(f"{kind} {count / total:.0%}" for kind, count in kinds.items())
    at = rounds[0]["matrix"]["measured_at"]
    return [
        f"matrix products alone at {at['nodes']} nodes and {at['logits']} logits: "
        f"{statistics.median(rates):.1f} GFLOP/s ({min(rates):.1f} to {max(rates):.1f})",
        f"a step needs {total / steps / 1e9:.1f} GFLOP of distinct tokens: {parts}",
    ]


def run(argv: Sequence[str], side: str, *options: str) -> Result:
    """Measure one side once in a process of its own."""
    if side != "llama_factory":
        return harness.run(__file__, argv, "--side", side, *options)
    with tempfile.TemporaryDirectory() as folder:
        harness.run(__file__, argv, "--side", side, "--prepare", folder, *options)
        config = str(Path(folder) / llama_factory.CONFIG)
        return harness.run(llama_factory.__file__, [config], python=llama_factory.python())


def to_be_had(sides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the sides that can be measured here, and why others cannot."""
    from llm_emo.errors import JobFailed

    if "llama_factory" in sides:
        try:
            llama_factory.python()
        except JobFailed as error:
            left = [side for side in sides if side != "llama_factory"]
            why = "left out: its dependencies cannot be had beside these versions"
            return left, [f"llama_factory {why}: {error}"]
    return list(sides), []


def compare(argv: Sequence[str], given: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure all sides in turn; return what is printed and what is written."""
    if given.profile:
        return profile(given), {}
    sides, missing = to_be_had((OURS, *peers_for(given, recipe_of(given).method.kind)))
    one = partial(run, argv)
    harness.tell("checking that all sides have the same loss in float32")
    losses = harness.checked(sides, one, "loss")
    require_same(losses, {side: [] for side in sides})
    results = harness.in_turn(sides, given.rounds, one, rate=RATE)
    require_same(losses, results)
    return "\n".join([report(losses, results, given), *missing]), {
        "first_loss_in_float32": losses, "left_out": missing, **harness.figures(results, RATE),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    return harness.bench(__file__, argv, arguments, measure, compare)


if __name__ == "__main__":
    raise SystemExit(main())
