"""Frozen weights in the layout in which a CPU's products read them, laid out once.

oneDNN, which torch multiplies by on a CPU, brings every weight into blocks that fill a processor's
registers before it multiplies, at every product anew. A frozen weight never changes, so its blocks
can be kept: one copy for x W^T and, where there is training, one for g W. In bfloat16 the result
is the same to the bit; in float32, which torch multiplies by another library, to rounding.

The operations are those that torch's own compiler uses for frozen models ("mkldnn" in
https://github.com/pytorch/pytorch/blob/main/torch/_inductor/fx_passes/mkldnn_fusion.py). Where they
are missing, or copies would be a large part of the memory, products read the weights as they are;
`LLM_EMO_PACKED=0` asks for that.

Letters: N nodes.
"""

import os
import platform
from functools import cache

import torch
from torch import Tensor

from llm_emo import machine

MEMORY = 1 / 8
"""Of the machine's memory: what copies may take, with those for training."""

LOOKED_AT = 256
"""How many numbers of a weight are compared to see that it is the same still."""

_ROWS = 512
"""What oneDNN is told of N; its choice did not depend on it from 32 to 2048."""


@cache
def available(dtype: torch.dtype) -> bool:
    """Whether this machine has products that read such a layout."""
    return (
        os.environ.get("LLM_EMO_PACKED") != "0"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (
            dtype == torch.float32
            or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


def worthwhile(size: int) -> bool:
    """Whether copies of weights of so many bytes, two of each, leave memory for the rest."""
    found = machine.memory()
    return found is not None and 2 * size <= MEMORY * found


class Packed:
    """The copies of one weight, each made when it is first needed.

    Without a weight it is a copy of nothing, as is what a copy or a pickle of it begins with.
    """

    def __init__(self) -> None:
        self._numbers: Tensor | None = None
        self._place = 0
        self._forward: Tensor | None = None
        self._backward: Tensor | None = None

    def __reduce__(self) -> tuple[type["Packed"], tuple[()]]:
        return Packed, ()

    def of(self, weight: Tensor) -> "Packed | None":
        """Return this for `weight`, without the copies of another; None where none can be had."""
        if weight.device.type != "cpu" or not weight.is_contiguous() or not available(weight.dtype):
            return None
        # Merging an adapter writes into a weight that stays where it is, unseen by autograd.
        numbers = weight.detach().view(-1)[:: max(1, weight.numel() // LOOKED_AT)]
        if (
            self._numbers is None
            or self._place != weight.data_ptr()
            or not torch.equal(self._numbers, numbers)
        ):
            self._numbers, self._place = numbers.clone(), weight.data_ptr()
            self._forward = self._backward = None
        return self

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias of x, shape (N, in), and of the weight that `of` was given."""
        if self._forward is None:
            self._forward = _laid_out(weight)
        return _multiplied(x, self._forward, bias)

    def back(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Return g W of g, shape (N, out)."""
        if self._backward is None:
            self._backward = _laid_out(weight.T)
        return _multiplied(grad, self._backward, None)


def _laid_out(weight: Tensor) -> Tensor:
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
    return made


def _multiplied(x: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), laid_out, bias, "none", [], ""
    )
    return made
