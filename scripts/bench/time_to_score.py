"""Time to a score: how long each trainer trains until dev macro-F1 is what is wanted.

    python scripts/bench/time_to_score.py --data-root DATA --recipe mastodon/lora --target 0.4

Examples per second compare steps; this compares what a user waits for. Both sides train the same
rows in the same steps from the same start, and every few steps both are measured on dev by this
program's scoring and metrics, off the clock. The clock of a side stops at the first measurement
that reaches the target.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import harness, matrix, trainers
from common.harness import OURS, Result, Rounds

RATE = "targets_per_hour"
SIDES = {name: text for name, text in trainers.SIDES.items() if name != "llama_factory"}
SHOWN = ("torch", "transformers", "peft", "trl")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments; exits with 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description="Print how long this program and others train until a dev macro-F1.",
        epilog="example: python scripts/bench/time_to_score.py --data-root DATA "
        "--recipe mastodon/lora --target 0.4 --every 10 -o time.json",
    )
    harness.add_recipe(parser, "mastodon/lora")
    parser.add_argument(
        "--target", type=float, default=0.4, help="macro-F1 on dev, 0 to 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--every",
        type=harness.positive,
        default=10,
        help="steps between measurements (default: 10)",
    )
    harness.add_peers(parser, SIDES, "trl")
    harness.add_common(parser, rounds=1, sides=SIDES)
    given = parser.parse_args(argv)
    if not 0 < given.target < 1:
        parser.error(f"--target: expected a share between 0 and 1, found {given.target}")
    return given


def until_target(
    trainer: Any, score: Any, *, target: float, every: int
) -> tuple[float | None, list[tuple[int, float, float]]]:
    """Train until `score()` reaches the target.

    Returns:
        The seconds of training until then, or None where the steps ended before; and for every
        measurement its step, the seconds of training until it, and the score.
    """
    from transformers import TrainerCallback

    trail: list[tuple[int, float, float]] = []
    started = 0.0  # moved forward by every measurement, so that none is on the clock

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            nonlocal started
            started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            nonlocal started
            if state.global_step % every and state.global_step != state.max_steps:
                return control
            harness.synchronise()
            paused = time.perf_counter()
            trail.append((state.global_step, paused - started, score()))
            control.should_training_stop |= trail[-1][2] >= target
            started += time.perf_counter() - paused
            return control

    trainer.add_callback(Watch())
    trainer.train()
    reached = trail[-1][2] >= target
    return trail[-1][1] if reached else None, trail


def measure(given: argparse.Namespace) -> Result:
    """Measure `given.side` in this process.

    Raises:
        JobFailed: the target was not reached.
    """
    from llm_emo import attention, metrics, recipes
    from llm_emo.errors import JobFailed, RecipeError
    from llm_emo.experiment import dialogues_of

    recipe = recipes.load_llm(given.recipe, given.overrides)
    if recipe.train is None:
        raise RecipeError(f"{given.recipe}: trains nothing; take a recipe with a method that does")
    epochs = recipe.train.epochs
    size = recipe.train.batch_size
    whole = [f"train.micro_batch_size={size}", "train.epochs=1"]
    settings = recipes.load_llm(given.recipe, [*given.overrides, *whole]).train
    labeller = harness.opened(given, recipe)
    experiment = labeller.experiment
    dev = experiment.examples("dev")
    encoded = labeller.encoder.encode(experiment.examples("train"))
    dialogues = dialogues_of(experiment)
    # One epoch of all epochs' steps: the learning rate falls over all of them.
    steps = [
        step
        for epoch in range(epochs)
        for step in trainers.drawn(
            encoded, settings, len(encoded) // size, given.seed + given.round, dialogues,
            epoch=epoch,
        )
    ]  # fmt: skip

    # The rate belongs to the machine, at that time: it is taken in turns with the training.
    products = None
    if given.side == OURS:
        first = matrix.of_training(labeller.model, recipe, steps[: given.every])
        products = matrix.products_of_training(labeller.model, first)
    taken: list[float] = []

    def score() -> float:
        if products:
            taken.extend(products.several(1))
        model = labeller.model
        training = model.training
        harness.attend_by(model, attention.NAME)
        rows = [(p.gold or "", p.label) for p in labeller.predict(dev)]
        model.train(training)
        if given.side != OURS:
            harness.stock(model)
        return metrics.point(
            [gold for gold, _ in rows], [label for _, label in rows],
            experiment.protocol.labels, "macro_f1",
            averaged_over=experiment.protocol.averaged_over,
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainers.trainer_of(
            given.side, labeller.model, labeller.base.tokenizer, steps, settings,
            folder=Path(folder), seed=recipe.seed,
        )  # fmt: skip
        harness.forget_peak()
        seconds, trail = until_target(trainer, score, target=given.target, every=given.every)
    if seconds is None:
        best = max(value for _, _, value in trail)
        raise JobFailed(
            f"{given.side}: dev macro-F1 did not reach {given.target} in {trail[-1][0]} steps "
            f"(best: {best:.3f}); take a lower --target"
        )
    needed = matrix.of_training(labeller.model, recipe, steps[: trail[-1][0]])
    return {
        **harness.described(given, labeller, *SHOWN),
        "operations": needed["operations"],
        "matrix": needed | products.rate(taken) if products else None,
        RATE: 3600 / seconds,
        "seconds": seconds,
        "steps": trail[-1][0],
        "macro_f1": trail[-1][2],
        "trail": trail,
        "peak_memory_bytes": harness.peak_memory(),
        "batch_size": size,
        "dev_rows": len(dev),
    }


def report(results: Rounds, given: argparse.Namespace) -> str:
    """Return everything that is printed."""
    one = results[OURS][0]
    rows = []
    for side, rounds in results.items():
        seconds = [result["seconds"] for result in rounds]
        rows.append(
            [
                side,
                f"{statistics.median(seconds):.0f} s", f"{min(seconds):.0f}", f"{max(seconds):.0f}",
                ", ".join(str(result["steps"]) for result in rounds),
                ", ".join(f"{result['macro_f1']:.3f}" for result in rounds),
                f"{statistics.median(result['share_of_matrix_rate'] for result in rounds):.0%}",
                f"{max(result['peak_memory_bytes'] for result in rounds) / 2**20:.0f} MiB",
            ]
        )  # fmt: skip
    heads = ["", "training", "min", "max", "steps", "macro-F1", "matrix share", "peak memory"]
    lines = [
        f"{given.recipe}: {one['model']}, {one['dtype']} on {one['device']}, batch "
        f"{one['batch_size']}; until macro-F1 {given.target} on {one['dev_rows']} dev rows, "
        f"measured every {given.every} steps off the clock; seed {given.seed}",
        *harness.machine_lines(results, *SHOWN),
        "",
        harness.columns(heads, rows),
        "",
        *(harness.ratio_line(*pair) for pair in harness.ratios(results, RATE).items()),
    ]
    return "\n".join(lines)


def compare(argv: Sequence[str], given: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure all sides in turn; return what is printed and what is written."""
    for peer in given.peers:
        trainers.require(peer)
    one = harness.side_of(__file__, argv)
    results = harness.in_turn((OURS, *given.peers), given.rounds, one, rate=RATE)
    return report(results, given), harness.figures(results, RATE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    return harness.bench(__file__, argv, arguments, measure, compare)


if __name__ == "__main__":
    raise SystemExit(main())
