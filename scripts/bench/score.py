"""Scoring speed: this program beside lm-eval and one padded forward per label.

    python scripts/bench/score.py --data-root DATA --recipe mastodon/zero_shot
    python scripts/bench/score.py --data-root DATA --recipe sst5/zero_shot

Every side computes log P(label | prompt) of every label under every prompt, with the recipe's base
model, for the same token ids; sides whose log-probabilities differ in float32 are not compared.
lm-eval runs a multiple_choice task through its Python API; the clock covers its `loglikelihood`
alone, so neither making requests nor its metrics count against it, and it is handed ids instead of
texts, so that it scores the same tokens and spends nothing on its tokenizer.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from common import environment, harness, inference, matrix
from common.harness import OURS, Result, Rounds
from common.inference import RATE, Ids

SIDES = {
    OURS: "this program: all labels under all prompts in a token trie",
    "lm_eval": "lm-eval's multiple_choice on HFLM; installed beside this program's packages",
    "padded": "one padded forward per label and batch of prompts",
}
TOLERANCE = 1e-4
"""By how many nats log-probabilities may differ in float32."""
CHECKED = 24
"""Rows whose log-probabilities are compared in float32."""
SHOWN = ("torch", "transformers", "lm-eval")
LM_EVAL = "lm-eval==0.4.13"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments; exits with 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description="Print rows/s of scoring all labels by this program and by others.",
        epilog="example: python scripts/bench/score.py --data-root DATA --recipe sst5/zero_shot "
        "--rows 256 -o score.json",
    )
    harness.add_recipe(parser, "mastodon/zero_shot")
    harness.add_peers(parser, SIDES, "lm_eval,padded")
    parser.add_argument(
        "--rows", type=harness.positive, default=128, help="test rows a round (default: 128)"
    )
    parser.add_argument(
        "--batch-size", type=harness.positive, default=16,
        help="sequences of a padded forward, of the peers (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--answers", choices=("words", "ended"), default="words",
        help="score the labels' words alone, as users of lm-eval do, or with the token that ends "
        "the answer, as this program does when it labels (default: %(default)s)",
    )  # fmt: skip
    check = "print the log-probabilities of a few rows in float32, on no clock"
    harness.add_common(parser, sides=SIDES, check=check)
    return parser.parse_args(argv)


# --- one side, in a process of its own ----------------------------------------------------------


def by_trie(
    model: Any, prompts: Sequence[Ids], answers: Sequence[Ids], *, tokens_per_pass: int
) -> tuple[float, list[list[float]]]:
    """Score with this program; return the seconds, and log P of every row and label."""
    from llm_emo.inference import score

    seconds: list[float] = []
    with harness.clock(seconds):
        found = dict(score(model, prompts, answers, tokens_per_pass=tokens_per_pass))
    return seconds[0], [list(found[row]) for row in range(len(prompts))]


def by_padding(
    model: Any, prompts: Sequence[Ids], answers: Sequence[Ids], *, batch_size: int
) -> tuple[float, list[list[float]]]:
    """Score with one padded forward per label, rows sorted by length; as `by_trie`.

    The head runs at the positions of the answer alone, which is the best that this way can do.
    """
    import torch

    seconds: list[float] = []
    device = next(model.parameters()).device
    sums = torch.zeros(len(prompts), len(answers))
    with torch.inference_mode(), harness.clock(seconds):
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        for start in range(0, len(order), batch_size):
            group = order[start : start + batch_size]
            for label, answer in enumerate(answers):
                rows = [prompts[row] + answer[:-1] for row in group]
                longest = max(map(len, rows))
                # To the left, so that all answers stand in the same columns.
                ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
                mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
                logits = model(
                    input_ids=ids.to(device), attention_mask=mask.to(device),
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
                    logits_to_keep=len(answer), use_cache=False,
                ).logits  # fmt: skip
                log_p = logits.float().log_softmax(-1)  # (B, T, V)
                picked = log_p[:, torch.arange(len(answer)), torch.tensor(answer)]
                sums[group, label] = picked.sum(1).cpu()
    return seconds[0], sums.tolist()


def by_lm_eval(
    model: Any, tokenizer: Any, prompts: Sequence[Ids], answers: Sequence[Ids], *, batch_size: int
) -> tuple[float, list[list[float]]]:
    """Score as a multiple_choice task of lm-eval; as `by_trie`."""
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    seconds: list[float] = []

    class SameIds(HFLM):  # type: ignore[misc]
        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            return list(prompts[int(context)]), list(answers[int(continuation)])

        def loglikelihood(self, *args: Any, **kwargs: Any) -> Any:
            with harness.clock(seconds):
                return super().loglikelihood(*args, **kwargs)

    rows = Dataset.from_list([{"row": row} for row in range(len(prompts))])
    task = ConfigurableTask(
        config={
            "task": "labels",
            "custom_dataset": lambda **_: {"test": rows},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": lambda doc: str(doc["row"]),
            "doc_to_choice": lambda doc: [str(label) for label in range(len(answers))],
            "doc_to_target": lambda doc: 0,
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
    )
    done = lm_eval.simple_evaluate(
        SameIds(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=[task],
        bootstrap_iters=0,
        log_samples=True,
    )
    found = {sample["doc"]["row"]: sample["resps"] for sample in done["samples"]["labels"]}
    return seconds[0], [
        [float(response[0][0]) for response in found[row]] for row in range(len(prompts))
    ]


def answers_of(ids: Sequence[Ids], kind: str) -> list[Ids]:
    """Return the labels as they are scored.

    Raises:
        RunError: one word's ids begin with another's, so that without the end token the shorter
            one would win.
    """
    from llm_emo.errors import RunError

    if kind == "ended":
        return list(ids)
    words = [answer[:-1] for answer in ids]
    for word in words:
        if any(other is not word and other[: len(word)] == word for other in words):
            raise RunError("a label's tokens begin another's; take --answers ended")
    return words


def measure(given: argparse.Namespace) -> Result:
    """Measure `given.side` in this process."""
    labeller, prompts, others = inference.drawn(given, CHECKED)
    model = labeller.model
    answers = answers_of(labeller.encoder.answers(labeller.experiment.answers), given.answers)
    tokens_per_pass = labeller.experiment.recipe.inference.tokens_per_pass
    side_of = {
        OURS: lambda rows: by_trie(model, rows, answers, tokens_per_pass=tokens_per_pass),
        "padded": lambda rows: by_padding(model, rows, answers, batch_size=given.batch_size),
        "lm_eval": lambda rows: by_lm_eval(
            model, labeller.base.tokenizer, rows, answers, batch_size=given.batch_size
        ),
    }
    side = side_of[given.side]
    if given.check:
        return {"side": given.side, "log_probabilities": side(prompts)[1]}
    products = None
    if given.side == OURS:
        counted, products = limits(model, prompts, answers, tokens_per_pass)
    found, result = inference.timed(side, prompts, others, products)
    if products:
        result["matrix"] |= counted
    return {
        **harness.described(given, labeller, *SHOWN),
        **result,
        "chosen": [max(range(len(row)), key=row.__getitem__) for row in found],
        "answers": [list(answer) for answer in answers],
    }


def limits(
    model: Any, prompts: Sequence[Ids], answers: Sequence[Ids], tokens_per_pass: int
) -> tuple[dict[str, Any], matrix.Products]:
    """Count what all rows need in one trie; return it, and the products of one pass.

    What the prompts of different passes have in common is counted once as well: an ideal that a
    pass of bounded size can only come near.
    """
    total, [(nodes, logits)] = matrix.of_scoring(model, iter([prompts]), answers)
    passes = max(1, round(nodes / tokens_per_pass))
    return {"operations": total, "nodes": nodes}, matrix.Products(
        model, nodes=nodes // passes, logits=logits // passes, training=False
    )


# --- all sides in turn --------------------------------------------------------------------------


def require_same(found: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float]:
    """Return by how many nats each peer's log-probabilities differ at most.

    Raises:
        JobFailed: by more than rounding.
    """
    from llm_emo.errors import JobFailed

    apart = {}
    for peer, rows in found.items():
        pairs = [
            abs(a - b)
            for own, other in zip(found[OURS], rows, strict=True)
            for a, b in zip(own, other, strict=True)
        ]
        apart[peer] = max(pairs)
        if not all(pair <= TOLERANCE for pair in pairs):  # nor where one is no number
            raise JobFailed(
                f"{peer}: log-probabilities differ by {max(pairs):.1e} nats in float32 from those "
                f"of {OURS}; they score different things"
            )
    return apart


def report(apart: Mapping[str, float], results: Rounds, given: argparse.Namespace) -> str:
    """Return everything that is printed."""
    one = results[OURS][0]
    lengths = ", ".join(str(len(answer)) for answer in one["answers"])
    lines = [
        f"{given.recipe}: {one['model']}, {one['dtype']} on {one['device']}, "
        f"{len(one['answers'])} labels of {lengths} tokens ({given.answers}), {one['rows']} rows "
        f"a round; peers in batches of {given.batch_size}",
        *harness.machine_lines(results, *SHOWN),
        "",
        harness.rates_table(results, RATE),
        "",
        f"{inference.rate_line(results)}; {one['matrix']['nodes']} distinct tokens of "
        f"{one['prompt_tokens'] * len(one['answers'])} that every label under every prompt has",
    ]
    for peer, values in harness.ratios(results, RATE).items():
        same = [
            a == b
            for own, other in zip(results[OURS], results[peer], strict=True)
            for a, b in zip(own["chosen"], other["chosen"], strict=True)
        ]
        lines.append(
            f"{harness.ratio_line(peer, values)}; log-probabilities differ by at most "
            f"{apart[peer]:.1e} in float32; same label in {statistics.mean(same):.1%} "
            f"in {one['dtype']}"
        )
    return "\n".join(lines)


def run(argv: Sequence[str], side: str, *options: str) -> Result:
    """Measure one side once in a process of its own."""
    python = sys.executable
    if side == "lm_eval":
        # Its packages pin an older python-dateutil than this program is tested with.
        python = str(environment.python_of("lm_eval", [LM_EVAL]))
    return harness.run(__file__, argv, "--side", side, *options, python=python)


def compare(argv: Sequence[str], given: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure all sides in turn; return what is printed and what is written."""
    sides, one = (OURS, *given.peers), partial(run, argv)
    harness.tell("checking that all sides have the same log-probabilities in float32")
    apart = require_same(harness.checked(sides, one, "log_probabilities"))
    results = harness.in_turn(sides, given.rounds, one, rate=RATE)
    return report(apart, results, given), {
        "log_probabilities_apart": apart, **harness.figures(results, RATE),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    return harness.bench(__file__, argv, arguments, measure, compare)


if __name__ == "__main__":
    raise SystemExit(main())
