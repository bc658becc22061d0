"""Generation speed: this program beside `model.generate` on left-padded batches.

    python scripts/bench/generate.py --data-root DATA --recipe friends/zero_shot

Both write greedily, with the recipe's base model, for the same prompts, up to the same number of
tokens, and stop at the same end token. In float32 the tokens that they write must be equal, or no
ratio is printed.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from common import harness, inference, matrix
from common.harness import OURS, Result, Rounds
from common.inference import RATE, Ids

SIDES = {
    OURS: "this program: one cache over the prompts' trie",
    "padded": "model.generate on left-padded batches, rows sorted by length",
}
CHECKED = 32
"""Rows whose tokens are compared in float32."""
SHOWN = ("torch", "transformers")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments; exits with 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description="Print rows/s of greedy generation by this program and by model.generate.",
        epilog="example: python scripts/bench/generate.py --data-root DATA "
        "--recipe friends/zero_shot --rows 128 -o generate.json",
    )
    harness.add_recipe(parser, "friends/zero_shot")
    parser.add_argument(
        "--rows", type=harness.positive, default=96, help="test rows a round (default: 96)"
    )
    parser.add_argument(
        "--batch-size", type=harness.positive, default=32,
        help="rows of a padded batch (default: %(default)s)",
    )  # fmt: skip
    check = "print the tokens of a few rows in float32, on no clock"
    harness.add_common(parser, sides=SIDES, check=check)
    return parser.parse_args(argv)


def by_trie(
    model: Any, prompts: Sequence[Ids], *, end: int, max_new_tokens: int, tokens_per_pass: int
) -> tuple[float, list[Ids]]:
    """Generate with this program; return the seconds and every row's tokens, without the end."""
    from llm_emo.inference import generate

    seconds: list[float] = []
    with harness.clock(seconds):
        found = dict(
            generate(
                model, prompts, ends=frozenset({end}), max_new_tokens=max_new_tokens,
                tokens_per_pass=tokens_per_pass,
            )
        )  # fmt: skip
    return seconds[0], [found[row] for row in range(len(prompts))]


def by_padding(
    model: Any, prompts: Sequence[Ids], *, end: int, max_new_tokens: int, batch_size: int
) -> tuple[float, list[Ids]]:
    """Generate with `model.generate`; as `by_trie`."""
    import torch
    from transformers import GenerationConfig

    # Not the checkpoint's own: a penalty or a temperature in it would make another task.
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=end,
        use_cache=True,
    )  # fmt: skip
    model.generation_config = config
    model.config.use_cache = True
    device = next(model.parameters()).device
    seconds: list[float] = []
    found: list[Ids] = [()] * len(prompts)
    with torch.inference_mode(), harness.clock(seconds):
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        for start in range(0, len(order), batch_size):
            group = order[start : start + batch_size]
            longest = max(len(prompts[row]) for row in group)
            gaps = [longest - len(prompts[row]) for row in group]
            ids = [[end] * gap + list(prompts[row]) for gap, row in zip(gaps, group, strict=True)]
            mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
            written = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=config,
            )[:, longest:]
            for row, tokens in zip(group, written.tolist(), strict=True):
                found[row] = tuple(tokens[: tokens.index(end)] if end in tokens else tokens)
    return seconds[0], found


def measure(given: argparse.Namespace) -> Result:
    """Measure `given.side` in this process."""
    labeller, prompts, others = inference.drawn(given, CHECKED)
    model, settings = labeller.model, labeller.experiment.recipe.inference
    end, longest = labeller.encoder.end, settings.max_new_tokens

    def side(prompts: Sequence[Ids]) -> tuple[float, list[Ids]]:
        if given.side == OURS:
            return by_trie(
                model, prompts, end=end, max_new_tokens=longest,
                tokens_per_pass=settings.tokens_per_pass,
            )  # fmt: skip
        return by_padding(
            model, prompts, end=end, max_new_tokens=longest, batch_size=given.batch_size
        )

    if given.check:
        return {"side": given.side, "tokens": side(prompts)[1]}
    products = None
    if given.side == OURS:
        read = len(matrix.depths_in(prompts))
        at = min(read, settings.tokens_per_pass)
        # Those of reading prompts, which are large. Writing has a row of a product per live text
        # only and is bound by reading the weights; its share is small by nature.
        products = matrix.Products(
            model, nodes=at, logits=len(prompts) * at // read + 1, training=False
        )
    found, result = inference.timed(side, prompts, others, products)
    if products:
        result["matrix"] |= needed(model, prompts, found)
    return {
        **harness.described(given, labeller, *SHOWN),
        **result,
        "tokens": found,
        "max_new_tokens": longest,
    }


def needed(model: Any, prompts: Sequence[Ids], found: Sequence[Ids]) -> dict[str, Any]:
    """Count what prompts and written tokens need in one trie."""
    # The token that ends a row is predicted, never read.
    depths = matrix.depths_in([p + w for p, w in zip(prompts, found, strict=True)])
    predicting = {
        (*prompt, *written[:at])
        for prompt, written in zip(prompts, found, strict=True)
        for at in range(len(written) + 1)
    }
    counted = matrix.operations(
        model, depths, [len(tokens) - 1 for tokens in predicting], training=False
    )
    return {"operations": sum(counted.values()), "nodes": len(depths),
            "read": len(matrix.depths_in(prompts))}  # fmt: skip


def require_same(found: dict[str, list[Sequence[int]]]) -> None:
    """Refuse to compare sides that write different tokens.

    Raises:
        JobFailed: they do.
    """
    from llm_emo.errors import JobFailed

    for peer, rows in found.items():
        for place, (own, other) in enumerate(zip(found[OURS], rows, strict=True)):
            if list(own) != list(other):
                raise JobFailed(
                    f"{peer} writes other tokens than {OURS} in float32 for row {place}: "
                    f"{list(other)}, not {list(own)}"
                )


def report(results: Rounds, given: argparse.Namespace) -> str:
    """Return everything that is printed."""
    one = results[OURS][0]
    written = [len(row) for result in results[OURS] for row in result["tokens"]]
    lines = [
        f"{given.recipe}: {one['model']}, {one['dtype']} on {one['device']}, greedy, at most "
        f"{one['max_new_tokens']} tokens, {one['rows']} rows a round; padded in batches of "
        f"{given.batch_size}",
        *harness.machine_lines(results, *SHOWN),
        "",
        harness.rates_table(results, RATE),
        "",
        f"{inference.rate_line(results)}; {one['matrix']['read']} distinct tokens of "
        f"{one['prompt_tokens']} in the prompts",
        f"{statistics.mean(written):.1f} tokens written a row",
    ]
    for peer, values in harness.ratios(results, RATE).items():
        same = [
            list(a) == list(b)
            for own, other in zip(results[OURS], results[peer], strict=True)
            for a, b in zip(own["tokens"], other["tokens"], strict=True)
        ]
        lines.append(
            f"{harness.ratio_line(peer, values)}; all tokens equal in float32, in {one['dtype']} "
            f"those of {statistics.mean(same):.1%} of rows"
        )
    return "\n".join(lines)


def compare(argv: Sequence[str], given: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure both sides in turn; return what is printed and what is written."""
    one = harness.side_of(__file__, argv)
    harness.tell("checking that both sides write the same tokens in float32")
    require_same(harness.checked(tuple(SIDES), one, "tokens"))
    results = harness.in_turn(tuple(SIDES), given.rounds, one, rate=RATE)
    return report(results, given), harness.figures(results, RATE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    return harness.bench(__file__, argv, arguments, measure, compare)


if __name__ == "__main__":
    raise SystemExit(main())
