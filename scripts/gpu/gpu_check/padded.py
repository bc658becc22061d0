"""The baseline: rows padded to one length, as trainers and evaluators commonly run them.

Labels are the answer's tokens, everything else is -100 (completion-only loss), and logits are
computed at every position, which is what a model of transformers does when it is given labels.
Training pads on the right, as ChatGLM2's training script does, so that token positions start at 0
in every row; generation pads on the left, because rows grow on the right.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm_emo import attention
from llm_emo.encoding import Encoded
from llm_emo.inference import Ids
from llm_emo.types import IGNORED

PAD = 0
"""ChatGLM2's padding token; masked, so that any id would do."""

ORIGINAL_WIDTH = 64 + 128 + 1
"""To what the original's training script pads every row: source, target, end token."""


@contextlib.contextmanager
def stock_attention(base: Any) -> Iterator[None]:
    """Attend as transformers does by itself."""
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(attention.NAME)


def width(rows: Sequence[Encoded], least: int = 0) -> int:
    """Return the length that these rows are padded to."""
    return max(least, *(len(row.prompt) + len(row.answer) for row in rows))


def tokens(rows: Sequence[Encoded], micro: int, least: int = 0) -> int:
    """Return how many tokens the transformer runs for these rows, in passes of `micro`."""
    parts = [rows[start : start + micro] for start in range(0, len(rows), micro)]
    return sum(len(part) * width(part, least) for part in parts)


def collate(rows: Sequence[Encoded], device: torch.device, least: int = 0) -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask` and `labels`, each of shape (B, L), padded right."""
    length = width(rows, least)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    for place, row in enumerate(rows):
        whole = torch.tensor([*row.prompt, *row.answer])
        ids[place, : len(whole)] = whole
        mask[place, : len(whole)] = 1
        labels[place, len(row.prompt) : len(whole)] = whole[len(row.prompt) :]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def loss(model: nn.Module, rows: Sequence[Encoded], targets: int, least: int = 0) -> Tensor:
    """Return the rows' summed cross-entropy over `targets`, as transformers computes it."""
    batch = collate(rows, next(model.parameters()).device, least)
    output = model(**batch, num_items_in_batch=targets, use_cache=False)
    value: Tensor = output.loss
    return value


def generate(base: Any, prompts: Sequence[Ids], new_tokens: int) -> list[Ids]:
    """Return transformers' own greedy continuations, each of `new_tokens` tokens.

    No token ends a row, so that every way of doing it writes the same number of tokens.
    """
    from transformers import GenerationConfig

    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), PAD)
    mask = torch.zeros((len(prompts), length), dtype=torch.long)
    for place, prompt in enumerate(prompts):
        ids[place, length - len(prompt) :] = torch.tensor(prompt)
        mask[place, length - len(prompt) :] = 1
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new_tokens, use_cache=True,
        pad_token_id=PAD, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    base.generation_config = settings  # else its own end token would be filled in
    written = base.generate(
        input_ids=ids.to(base.device), attention_mask=mask.to(base.device),
        generation_config=settings,
    )  # fmt: skip
    return [tuple(row) for row in written[:, length:].tolist()]


@torch.inference_mode()
def score(model: nn.Module, prompts: Sequence[Ids], answers: Sequence[Ids]) -> Tensor:
    """Return log P(answer | prompt), shape (rows, k): one pass of whole rows for each answer."""
    columns = []
    for answer in answers:
        rows = [Encoded(str(place), prompt, answer) for place, prompt in enumerate(prompts)]
        batch = collate(rows, next(model.parameters()).device)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]  # (B, L - 1, V)
        log_probs = logits.float().log_softmax(-1)
        picked = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]  # (B, L - 1)
        columns.append(picked.where(labels != IGNORED, 0).sum(-1))
    return torch.stack(columns, dim=1)
