"""Frozen linear layers that read one input as one product, with their LoRA adapters side by side.

The weights are laid next to one another in memory. The adapters' products are narrow ones, which
libraries run far below a machine's rate; on a CPU they are compiled loops (`native_lora.py`).
Elsewhere the A's stand below one another and the B's are blocks of a matrix that is zero elsewhere:
that costs some operations and spares products.

Letters: N nodes, R the sum of the adapters' ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from llm_emo import native, native_lora
from llm_emo.lean import plain
from llm_emo.packed import Packed


@dataclass(frozen=True)
class Group:
    """Frozen projections of one input, as one."""

    weight: Tensor
    """All outputs, one projection's below another's."""
    bias: Tensor | None
    sizes: tuple[int, ...]
    """The outputs of each."""
    ranks: tuple[int, ...]
    """The rank of the LoRA of each; 0: it has none."""
    scale: float
    """What LoRA's updates are multiplied by."""
    dtype: torch.dtype
    """What LoRA's matrices learn in."""
    packed: Packed | None
    """Copies of the weight that products read faster."""
    compiled: bool
    """Whether LoRA's products are compiled loops."""


def _is_plain(layer: nn.Module) -> bool:
    return plain(layer) if type(layer) is LoraLinear else type(layer) is nn.Linear


def are_alike(bases: Sequence[Any]) -> bool:
    """Whether layers are frozen, and alike."""
    kinds = set()
    for base in bases:
        if type(base) is not nn.Linear or base.weight.requires_grad:
            return False
        if base.bias is not None and base.bias.requires_grad:
            return False
        kinds.add((base.bias is None, base.weight.dtype))
    return len(kinds) == 1


def are_one(layers: Sequence[Any]) -> bool:
    """Whether projections of one input can be computed as one."""
    if not all(_is_plain(layer) for layer in layers):
        return False
    scales = {layer.scaling["default"] for layer in layers if isinstance(layer, LoraLinear)}
    return len(scales) <= 1 and are_alike([base_of(layer) for layer in layers])


def base_of(layer: Any) -> Any:
    """Return the frozen layer, with LoRA or without."""
    return layer.base_layer if isinstance(layer, LoraLinear) else layer


def group_of(layers: Sequence[Any], packed: Packed | None) -> Group:
    """Return layers for which `are_one` holds as one; `packed` may hold copies of their weight."""
    bases = [base_of(layer) for layer in layers]
    weight = stacked(bases)
    biases = [base.bias for base in bases]
    adapted = [layer for layer in layers if isinstance(layer, LoraLinear)]
    sizes = tuple(len(base.weight) for base in bases)
    ranks = tuple(layer.r["default"] if layer in adapted else 0 for layer in layers)
    parts = [part["default"].weight for one in adapted for part in (one.lora_A, one.lora_B)]
    dtype = parts[0].dtype if parts else weight.dtype
    return Group(
        weight,
        biases[0] if len(biases) == 1 or biases[0] is None else torch.cat(biases),
        sizes,
        ranks,
        adapted[0].scaling["default"] if adapted else 1.0,
        dtype,
        None if packed is None else packed.of(weight),
        all(part.dtype == torch.float32 for part in parts)
        and native.serves(weight)
        and native.multiplies(weight.dtype)
        and native_lora.are_whole(ranks, (*sizes, weight.shape[1])),
    )


def stacked(layers: Sequence[Any]) -> Tensor:
    """Return all weights as one, of which each layer's becomes a part; no second copy is kept."""
    weights = [layer.weight for layer in layers]
    first, inputs = weights[0], weights[0].shape[1]
    if len(weights) == 1:
        return first  # type: ignore[no-any-return]
    outputs = sum(map(len, weights))
    # They may have been moved, each for itself, since they were laid.
    storage, place = first.untyped_storage()._cdata, first.storage_offset()
    for weight in weights:
        if (
            weight.untyped_storage()._cdata != storage
            or weight.storage_offset() != place
            or not weight.is_contiguous()
        ):
            break
        place += weight.numel()
    else:
        return first.as_strided((outputs, inputs), (inputs, 1))  # type: ignore[no-any-return]
    # What is made in inference mode could never be trained with.
    with torch.inference_mode(mode=False), torch.no_grad():
        stack = torch.cat([weight.detach() for weight in weights])
        parts = torch.split(stack, [len(weight) for weight in weights])
        for layer, part in zip(layers, parts, strict=True):
            layer.weight.data = part
    return stack


def product(x: Tensor, group: Group) -> Tensor:
    """Return all frozen projections of `x`, side by side."""
    if group.packed is None:
        return nn.functional.linear(x, group.weight, group.bias)
    return group.packed.product(x, group.weight, group.bias)


def back(grad: Tensor, group: Group) -> Tensor:
    """Return the gradient of the input of frozen projections."""
    if group.packed is None:
        return grad @ group.weight
    return group.packed.back(grad, group.weight)


Kept = tuple[Tensor, ...]
"""What the gradients of a group's adapters need: its input, (N, in), and that in the adapters'
ranks, (N, R); then A and B, as products read them. Of a group without: nothing."""


def project(
    x: Tensor, group: Group, adapters: Sequence[Tensor], *, learning: bool
) -> tuple[Tensor, Kept]:
    """Return all projections of `x`, side by side, and what is kept while they learn.

    `adapters` are A and B of each that has a LoRA, in turn.
    """
    out = product(x, group)
    if not adapters:
        return out, ()
    if group.compiled and out.dtype == x.dtype:  # else, as under autocast, torch's refuse
        low = native_lora.lora(x, out, group.sizes, group.ranks, adapters, group.scale)
    else:
        adapters = _joined(group, adapters, x.dtype)
        low = x @ adapters[0].T  # (N, R)
        out.addmm_(low, adapters[1].T)
    return out, (x, low, *adapters) if learning else ()


def _joined(group: Group, adapters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Put adapters, A and B in turn, side by side, in the dtype of a pass.

    Returns A, shape (R, in), R the sum of ranks, and B, shape (out, R): each projection's where its
    outputs meet its ranks, times the scale, else zero.
    """
    a, b = adapters[:2]
    if len(group.sizes) > 1:
        a = torch.cat([*adapters[::2]])
        bs = iter(adapters[1::2])
        blocks = [
            next(bs) if rank else b.new_empty(size, 0)
            for rank, size in zip(group.ranks, group.sizes, strict=True)
        ]
        b = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return a.to(dtype), (b * group.scale).to(dtype)


def unproject(grad: Tensor, group: Group, kept: Kept) -> tuple[Tensor, list[Tensor]]:
    """Return the gradient of the input, and those of the adapters, A and B in turn."""
    dx = back(grad, group)
    return dx, learned(grad, group, kept, dx)


def learned(grad: Tensor, group: Group, kept: Kept, dx: Tensor | None = None) -> list[Tensor]:
    """Return the gradients of A and B in turn; add that of the input to `dx`."""
    if not kept:
        return []
    x, low, *adapters = kept
    if group.compiled:
        return native_lora.lora_backward(
            grad, x, low, group.sizes, group.ranks, adapters, group.scale, dx
        )
    a, b = adapters
    dlow = grad @ b
    if dx is not None:
        dx.addmm_(dlow, a)
    das = torch.split((dlow.T @ x).to(group.dtype), list(group.ranks))
    # Of B, only what is no zero for good.
    rows = torch.split(low.T @ grad, list(group.ranks))
    found: list[Tensor] = []
    start = 0
    for rank, size, da, row in zip(group.ranks, group.sizes, das, rows, strict=True):
        if rank:
            db = row[:, start : start + size].T.to(group.dtype)
            found += [da, db.mul_(group.scale)]
        start += size
    return found
