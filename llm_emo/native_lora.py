"""LoRA's narrow products, compiled: `native_lora.c`, as `projections.py` calls it.

Letters: N nodes, R the sum of the adapters' ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm_emo.native import COUNT, POINTER, library

RANKS = 8
"""What an adapter's rank is a multiple of."""

COLUMNS = 32
"""What the inputs and outputs of its layer are multiples of."""


def are_whole(ranks: Sequence[int], widths: Sequence[int]) -> bool:
    """Whether loops serve LoRAs of these ranks, between these inputs and outputs."""
    return not (any(rank % RANKS for rank in ranks) or any(width % COLUMNS for width in widths))


def lora(
    x: Tensor,
    out: Tensor,
    sizes: Sequence[int],
    ranks: Sequence[int],
    adapters: Sequence[Tensor],
    scale: float,
) -> Tensor:
    """Add LoRA's updates to projections, in place; return x A^T, all side by side, (N, R).

    Args:
        x: What all of them read, shape (N, in).
        out: The projections, side by side, shape (N, sum of sizes), contiguous.
        sizes: The outputs of each; they and the inputs are multiples of `COLUMNS`.
        ranks: Of the adapter of each, multiples of `RANKS`; 0: it has none.
        adapters: A, shape (rank, in), and B, shape (size, rank), in turn; float32.
        scale: What updates are multiplied by.
    """
    x, adapters = x.contiguous(), [part.contiguous() for part in adapters]
    low = x.new_empty(len(x), sum(ranks))
    room = x.new_empty(sum(map(Tensor.numel, adapters)))
    library(x.dtype).lora(
        x.data_ptr(), *x.shape, len(sizes), _counts(ranks), _counts(sizes),
        *_places(ranks, adapters), scale, out.data_ptr(), low.data_ptr(), room.data_ptr(),
    )  # fmt: skip
    return low


def lora_backward(
    grad: Tensor,
    x: Tensor,
    low: Tensor,
    sizes: Sequence[int],
    ranks: Sequence[int],
    adapters: Sequence[Tensor],
    scale: float,
    dx: Tensor | None,
) -> list[Tensor]:
    """Return the gradients of the adapters, in float32; add that of x to `dx`, in place.

    Args:
        grad: That of `out`, shape (N, sum of sizes).
        x: What `lora` was given.
        low: What it returned.
        sizes: What it was given, as are the next three.
        ranks: See there.
        adapters: See there.
        scale: See there.
        dx: Shape (N, in), contiguous; None: nobody asks for it.
    """
    grad, x, adapters = grad.contiguous(), x.contiguous(), [part.contiguous() for part in adapters]
    found = [torch.empty_like(part) for part in adapters]
    room = x.new_empty(sum(map(Tensor.numel, adapters)) + 3 * (len(x) + 1) * low.shape[1])
    library(x.dtype).lora_backward(
        grad.data_ptr(), x.data_ptr(), low.data_ptr(), *x.shape, len(sizes), _counts(ranks),
        _counts(sizes), *_places(ranks, adapters), scale, None if dx is None else dx.data_ptr(),
        *_places(ranks, found), room.data_ptr(),
    )  # fmt: skip
    return found


def _counts(numbers: Sequence[int]) -> Any:
    return (COUNT * len(numbers))(*numbers)


def _places(ranks: Sequence[int], adapters: Sequence[Tensor]) -> list[Any]:
    """Return where all A and all B lie; nowhere for those of rank 0."""
    rest = iter(part.data_ptr() for part in adapters)
    pairs = [(next(rest), next(rest)) if rank else (None, None) for rank in ranks]
    return [(POINTER * len(ranks))(*side) for side in zip(*pairs, strict=True)]
