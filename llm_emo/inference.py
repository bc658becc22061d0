"""Scoring and generating, both on the token trie.

Rows are sorted by their token ids, so that what they share lies in the same pass, and a pass
holds as many rows as fit into a budget of distinct tokens. Every row comes back exactly once,
under its index, and what is computed for it does not depend on its company.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from llm_emo.trie import TokenTrie, TrieDecoder, node_logits

Ids = tuple[int, ...]


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


@torch.inference_mode()
def score(
    model: nn.Module, prompts: Sequence[Ids], answers: Sequence[Ids], *, tokens_per_pass: int
) -> Iterator[tuple[int, list[float]]]:
    """Yield each row's index and log P(answer | prompt) of every answer, in nats.

    Args:
        model: The causal LM, adapted or not; put into eval mode.
        prompts: Token ids of the rows.
        answers: Token ids of the k answers, each with its end token. With the end token they
            form a prefix-free code, so that their probabilities may be normalised.
        tokens_per_pass: Budget of distinct tokens.
    """
    model.eval()
    extra = sum(len(answer) - 1 for answer in answers)
    for group in passes(prompts, extra, tokens_per_pass):
        sequences = [prompts[row] + answer[:-1] for row in group for answer in answers]
        trie = TokenTrie.build(sequences)
        at, tokens = targets(
            trie, [len(prompts[row]) for row in group for _ in answers], list(answers) * len(group)
        )
        nodes, where = torch.unique(at, return_inverse=True)
        log_probs = node_logits(model, trie, nodes).float().log_softmax(-1)  # (T, V)
        picked = log_probs[where.to(log_probs.device), tokens.to(log_probs.device)].cpu()
        owner = torch.arange(len(sequences)).repeat_interleave(
            torch.tensor([len(answer) for answer in answers] * len(group))
        )
        sums = torch.zeros(len(sequences)).index_add_(0, owner, picked)
        yield from zip(group, sums.view(len(group), -1).tolist(), strict=True)


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
    prompts: Sequence[Ids],
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
        prompts: Token ids of the rows.
        ends: Tokens that end a continuation.
        max_new_tokens: The most tokens to write.
        tokens_per_pass: Budget of distinct tokens.
    """
    model.eval()
    twins: dict[Ids, list[int]] = {}
    for row, prompt in enumerate(prompts):
        twins.setdefault(prompt, []).append(row)
    distinct = list(twins)
    # A row adds at most one node a step.
    for group in passes(distinct, max_new_tokens, tokens_per_pass):
        decoder = TrieDecoder(model, TokenTrie.build([distinct[i] for i in group]))
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
        for place, index in enumerate(group):
            for row in twins[distinct[index]]:
                yield row, tuple(written[place])
