"""Scoring and generating, both on the token trie, for any number of rows.

Rows come as a stream. A window of them is sorted by their token ids, so that what they share
lies in the same pass, and a pass holds as many rows as fit into a budget of distinct tokens.
What all rows begin with (template and instruction) is run once and kept for all passes. Every
row comes back exactly once, under its index, and what is computed for it does not depend on its
company.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llm_emo.lean import log_probabilities
from llm_emo.trie import Beginning, TokenTrie, TrieDecoder, begin, node_logits

Ids = tuple[int, ...]

WINDOW = 2048
"""Rows that are sorted together, and the most that memory has to hold.

Behind a shared instruction, tweets and film reviews leave 3 % more tokens to run in windows of
256 rows than in windows of 4,096, and 1 % more in windows of 1,024.
"""


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the leading tokens that `a` and `b` have in common."""
    shared = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        shared += 1
    return shared


def passes(prompts: Sequence[Ids], extra: int, budget: int) -> Iterator[list[int]]:
    """Yield groups of indices whose tries have at most `budget` nodes.

    Args:
        prompts: Token ids of the rows.
        extra: Nodes that each row adds behind its prompt.
        budget: Distinct tokens of one pass; a single row may exceed it.
    """
    group: list[int] = []
    nodes = 0
    before: Ids = ()
    for index in sorted(range(len(prompts)), key=prompts.__getitem__):
        prompt = prompts[index]
        cost = len(prompt) - shared_length(before, prompt) + extra
        if group and nodes + cost > budget:
            yield group
            group, nodes, cost = [], 0, len(prompt) + extra
        group.append(index)
        nodes += cost
        before = prompt
    if group:
        yield group


@dataclass(frozen=True)
class Cut:
    """Some rows of a stream: the index of the first, their prompts, and their passes.

    `beginning` holds the first tokens of all prompts where they are run ahead of the passes; as
    long as it stays the same from one cut to the next, it is run once.
    """

    first: int
    prompts: list[Ids]
    passes: list[list[int]]
    beginning: Ids


def cuts(prompts: Iterable[Ids], extra: int, budget: int) -> Iterator[Cut]:
    """Cut a stream of prompts into windows, and each into passes.

    Args:
        prompts: Token ids of the rows.
        extra: Nodes that each row adds behind its prompt.
        budget: Distinct tokens of one pass, its beginning's included.
    """
    rest, first = iter(prompts), 0
    ids: Ids = ()
    while window := list(itertools.islice(rest, WINDOW)):
        groups = list(passes(window, extra, budget))
        least, greatest = min(window), max(window)
        # What these two share, all share. One token must be left, to read the next one from.
        shared = min(shared_length(least, greatest), len(least) - 1)
        if shared < len(ids) or least[: len(ids)] != ids:
            ids = ()
        if not ids and len(groups) > 1:
            ids = least[:shared]
        yield Cut(first, window, groups, ids)
        first += len(window)


@dataclass(frozen=True)
class _Window:
    """Some rows of a stream: their prompts, the index of the first, and their passes.

    `beginning`, if there is one, holds the first tokens of all prompts.
    """

    first: int
    prompts: list[Ids]
    passes: list[list[int]]
    beginning: Beginning | None

    def tails(self, group: Sequence[int]) -> list[Ids]:
        """Return what of a pass's prompts is left to run."""
        start = 0 if self.beginning is None else self.beginning.length
        return [self.prompts[row][start:] for row in group]


def _windows(
    model: nn.Module, prompts: Iterable[Ids], extra: int, budget: int
) -> Iterator[_Window]:
    """Cut a stream of prompts into windows; run their beginning where it is not the last one's."""
    ids: Ids = ()
    beginning: Beginning | None = None
    for cut in cuts(prompts, extra, budget):
        if cut.beginning != ids:
            ids = cut.beginning
            beginning = begin(model, ids) if ids else None
        yield _Window(cut.first, cut.prompts, cut.passes, beginning)


@torch.inference_mode()
def score(
    model: nn.Module, prompts: Iterable[Ids], answers: Sequence[Ids], *, tokens_per_pass: int
) -> Iterator[tuple[int, list[float]]]:
    """Yield each row's index and log P(answer | prompt) of every answer, in nats.

    Args:
        model: The causal LM, adapted or not; put into eval mode.
        prompts: Token ids of the rows; read a window at a time.
        answers: Token ids of the k answers, each with its end token. With the end token they
            form a prefix-free code, so that their probabilities may be normalised.
        tokens_per_pass: Budget of distinct tokens, the beginning's included.
    """
    model.eval()
    extra = sum(len(answer) - 1 for answer in answers)
    for window in _windows(model, prompts, extra, tokens_per_pass):
        for group in window.passes:
            tails = window.tails(group)
            sequences = [tail + answer[:-1] for tail in tails for answer in answers]
            trie = TokenTrie.build(sequences)
            at, tokens = targets(
                trie, [len(tail) for tail in tails for _ in answers], list(answers) * len(group)
            )
            nodes, where = torch.unique(at, return_inverse=True)
            logits = node_logits(model, trie, nodes, window.beginning)
            where, tokens = where.to(logits.device), tokens.to(logits.device)
            picked = log_probabilities(logits, where, tokens).cpu()  # (T,)
            owner = torch.arange(len(sequences)).repeat_interleave(
                torch.tensor([len(answer) for answer in answers] * len(group))
            )
            sums = torch.zeros(len(sequences)).index_add_(0, owner, picked)
            rows = [window.first + row for row in group]
            yield from zip(rows, sums.view(len(group), -1).tolist(), strict=True)


def targets(
    trie: TokenTrie, prompt_lengths: Sequence[int], answers: Sequence[Ids]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the node before every answer token, and that token; both of shape (T,).

    Row i of the trie is a prompt of `prompt_lengths[i]` tokens and `answers[i]` without its
    last token: the end token is predicted, never read. A pair that stands in several rows
    stands here as often, because it counts as often in the loss.
    """
    rows = [i for i, answer in enumerate(answers) for _ in answer]
    places = [
        start - 1 + offset
        for start, answer in zip(prompt_lengths, answers, strict=True)
        for offset in range(len(answer))
    ]
    tokens = [token for answer in answers for token in answer]
    return trie.nodes[rows, places], torch.tensor(tokens)


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: Iterable[Ids],
    *,
    ends: frozenset[int],
    max_new_tokens: int,
    tokens_per_pass: int,
) -> Iterator[tuple[int, Ids]]:
    """Yield each row's index and its greedy continuation, without the end token.

    Always greedy, whatever the model's generation config says: a temperature or a repetition
    penalty that leaks in punishes labels that the prompt already lists.

    Args:
        model: The causal LM, adapted or not; put into eval mode.
        prompts: Token ids of the rows; read a window at a time. Equal ones of a window are run
            once.
        ends: Tokens that end a continuation.
        max_new_tokens: The most tokens to write.
        tokens_per_pass: Budget of distinct tokens, the beginning's included.
    """
    model.eval()
    # A row adds at most one node a step.
    for window in _windows(model, prompts, max_new_tokens, tokens_per_pass):
        for group in window.passes:
            tails = window.tails(group)
            decoder = TrieDecoder(model, TokenTrie.build(tails), window.beginning)
            written: list[list[int]] = [[] for _ in group]
            live = list(range(len(group)))
            for step in range(max_new_tokens):
                tokens = decoder.logits.argmax(-1)
                going = []
                for place, token in enumerate(tokens.tolist()):
                    if token not in ends:
                        written[live[place]].append(token)
                        going.append(place)
                if not going or step + 1 == max_new_tokens:
                    break
                if len(going) < len(live):
                    rows = torch.tensor(going, device=tokens.device)
                    decoder.keep(rows)
                    tokens = tokens[rows]
                    live = [live[place] for place in going]
                decoder.step(tokens)
            for place, row in enumerate(group):
                yield window.first + row, tuple(written[place])
