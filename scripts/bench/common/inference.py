"""What `score.py` and `generate.py` share: the same test rows on every side, and one clock."""

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from common import harness
from common.harness import OURS, Result, Rounds
from common.matrix import Products

RATE = "rows_per_second"

Ids = tuple[int, ...]


def drawn(given: argparse.Namespace, checked: int) -> tuple[Any, list[Ids], list[Ids]]:
    """Return the recipe's labeller, the prompts of a round's random test rows, and others' as many.

    The others are for warming up: a pass that is larger than any before waits for the system's
    memory, sometimes longer than for its products.

    Args:
        given: The benchmark's arguments; with `--check` the model is in float32.
        checked: How many rows `--check` takes at most.
    """
    from llm_emo import recipes

    dtype = ("model.dtype=float32",) if given.check else ()
    labeller = harness.opened(given, recipes.load_llm(given.recipe, [*given.overrides, *dtype]))
    labeller.model.eval()
    examples = labeller.experiment.examples("test")
    count = min(checked if given.check else given.rows, len(examples))
    rows = random.Random(given.seed + given.round).sample(examples, min(2 * count, len(examples)))
    if given.side != OURS:
        harness.stock(labeller.model)
    prompts = [row.prompt for row in labeller.encoder.encode(rows)]
    return labeller, prompts[:count], prompts[count:] or prompts


def timed(
    side: Callable[[Sequence[Ids]], tuple[float, Any]], prompts: Sequence[Ids],
    others: Sequence[Ids], products: Products | None = None,
) -> tuple[Any, Result]:  # fmt: skip
    """Return what a side finds, and its figures; other prompts run before.

    The machine's rate belongs to a moment, so `products` are timed just before and just after.
    """
    side(others)
    seconds = products.several() if products else []
    harness.forget_peak()
    taken, found = side(prompts)
    peak = harness.peak_memory()
    seconds += products.several() if products else []
    return found, {
        RATE: len(prompts) / taken,
        "seconds": taken,
        "rows": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "peak_memory_bytes": peak,
        "matrix": products.rate(seconds) if products else None,
    }


def rate_line(results: Rounds) -> str:
    """Return how fast this machine multiplies matrices of a pass's shapes."""
    limits = [result["matrix"] for result in results[OURS]]
    rate = statistics.median(limit["operations_per_second"] for limit in limits) / 1e9
    return f"matrix products alone at {limits[0]['measured_at']['nodes']} nodes: {rate:.1f} GFLOP/s"
