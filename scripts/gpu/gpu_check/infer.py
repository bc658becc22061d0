"""Speed of answering: the trie beside padded rows, by generation and by scoring the labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gpu_check import padded
from gpu_check.turns import Batch, Clock, Side, guarded, measure
from llm_emo import inference
from llm_emo.encoding import Encoded
from llm_emo.inference import Ids
from llm_emo.trie import TokenTrie

UNBOUNDED = 10**9
"""Tokens a pass: the rows in a pass are what bounds it here."""


def parts(rows: Batch, micro: int) -> list[list[Ids]]:
    """Return the prompts in passes of at most `micro` rows."""
    prompts = [row.prompt for row in rows]
    return [prompts[start : start + micro] for start in range(0, len(prompts), micro)]


def trie_generate(model: nn.Module, prompts: Sequence[Ids], new_tokens: int) -> list[Ids]:
    """Return the program's greedy continuations, in the prompts' order; no token ends a row."""
    found = dict(
        inference.generate(
            model, prompts, ends=frozenset(), max_new_tokens=new_tokens, tokens_per_pass=UNBOUNDED
        )
    )
    return [found[row] for row in range(len(prompts))]


def trie_score(
    model: nn.Module, prompts: Sequence[Ids], answers: Sequence[Ids]
) -> list[list[float]]:
    """Return the program's log P(answer | prompt), in the prompts' order."""
    found = dict(inference.score(model, prompts, answers, tokens_per_pass=UNBOUNDED))
    return [found[row] for row in range(len(prompts))]


def generation(model: Any, new_tokens: int) -> list[Side]:
    """Return both ways of generating; tokens are those of the prompts' pass and of the new ones."""

    def ours(rows: Batch, micro: int) -> None:
        for prompts in parts(rows, micro):
            trie_generate(model, prompts, new_tokens)

    def theirs(rows: Batch, micro: int) -> None:
        for prompts in parts(rows, micro):
            padded.generate(model, prompts, new_tokens)

    def our_tokens(rows: Batch, micro: int) -> int:
        new = new_tokens - 1  # the last token is written, never read
        return sum(
            len(TokenTrie.build(prompts)) + new * len(set(prompts))
            for prompts in parts(rows, micro)
        )

    def their_tokens(rows: Batch, micro: int) -> int:
        new = new_tokens - 1
        return sum(len(prompts) * (max(map(len, prompts)) + new) for prompts in parts(rows, micro))

    return [
        Side("trie", ours, our_tokens),
        Side("padded", theirs, their_tokens, around=lambda: padded.stock_attention(model)),
    ]


def scoring(model: Any, answers: Sequence[Ids]) -> list[Side]:
    """Return both ways of scoring k labels."""

    def ours(rows: Batch, micro: int) -> None:
        for prompts in parts(rows, micro):
            trie_score(model, prompts, answers)

    def theirs(rows: Batch, micro: int) -> None:
        for prompts in parts(rows, micro):
            padded.score(model, prompts, answers).cpu()

    def our_tokens(rows: Batch, micro: int) -> int:
        return sum(
            len(TokenTrie.build([prompt + answer[:-1] for prompt in prompts for answer in answers]))
            for prompts in parts(rows, micro)
        )

    def their_tokens(rows: Batch, micro: int) -> int:
        return sum(
            padded.tokens([Encoded("", row.prompt, answer) for row in rows], micro)
            for answer in answers
        )

    return [
        Side("trie", ours, our_tokens),
        Side("padded", theirs, their_tokens, around=lambda: padded.stock_attention(model)),
    ]


def same_tokens(model: Any, prompts: Sequence[Ids], new_tokens: int) -> float | None:
    """Return the share of tokens that both ways write alike; None if there is no memory.

    In bfloat16, rounding settles ties otherwise, and a row goes on from another token.
    """
    same: list[bool] = []

    def run() -> None:
        ours = trie_generate(model, prompts, new_tokens)
        with padded.stock_attention(model):
            theirs = padded.generate(model, prompts, new_tokens)
        same.extend(
            a == b
            for left, right in zip(ours, theirs, strict=True)
            for a, b in zip(left, right, strict=True)
        )

    return sum(same) / len(same) if guarded(run) is None else None


def compare(
    model: Any, batches: Sequence[Batch], answers: Sequence[Ids], new_tokens: int,
    clock: Clock, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Measure generation and scoring over these batches of one corpus."""
    model.eval()
    # Several batches in one pass is what the program does: a pass is bounded by its tokens.
    size = min(8, len(batches))
    wide = [
        [row for batch in batches[start : start + size] for row in batch]
        for start in range(0, len(batches) - size + 1, size)
    ]
    once = Clock(rounds=1, steps=len(wide), warm_up=0, seconds=clock.seconds)
    trie, _ = generation(model, new_tokens)
    scored, _ = scoring(model, answers)
    return {
        "new_tokens": new_tokens,
        "labels": len(answers),
        "same_tokens": same_tokens(model, [row.prompt for row in batches[0]], new_tokens),
        "generate": measure(generation(model, new_tokens), batches, clock, device),
        "generate_wide": measure([trie], wide, once, device),
        "score": measure(scoring(model, answers), batches, clock, device),
        "score_wide": measure([scored], wide, once, device),
    }
