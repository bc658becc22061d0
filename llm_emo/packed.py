"""Frozen weights in the layout in which a CPU's products read them, laid out once.

oneDNN, which torch multiplies by on a CPU, brings every weight into blocks that fill a processor's
registers before it multiplies, at every product anew. A frozen weight never changes, so its blocks
can be kept: one copy for x W^T and, where there is training, one for g W. In bfloat16 the result
is the same to the bit where the processor multiplies bfloat16 itself; elsewhere, and in float32,
which torch multiplies by another library, it is the same to rounding.

The operations are those that torch's own compiler uses for frozen models ("mkldnn" in
https://github.com/pytorch/pytorch/blob/main/torch/_inductor/fx_passes/mkldnn_fusion.py). Where they
are missing, or copies would be a large part of the memory, products read the weights as they are;
`LLM_EMO_PACKED=0` asks for that. So they do on processors of another make than x86, on which
nobody has measured.

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

LOOKED_AT = 128
"""About how many numbers of a weight are compared to see that nobody wrote into it."""

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
    """Whether copies of weights of so many bytes, two of each, leave memory for the rest.

    Every process of a job keeps its own.
    """
    found = machine.memory()
    return found is not None and 2 * size * machine.processes().num_processes <= MEMORY * found


class Packed:
    """The copies of one weight, each made when it is first needed.

    What is copied or pickled of it is empty again.
    """

    def __init__(self) -> None:
        self._numbers: Tensor | None = None
        self._place = 0
        self._forward: Tensor | None = None
        self._backward: Tensor | None = None

    def __reduce__(self) -> tuple[type["Packed"], tuple[()]]:
        return Packed, ()

    def of(self, weight: Tensor) -> "Packed | None":
        """Return this for `weight`, without copies of what that was before; None: have none."""
        if weight.device.type != "cpu" or not weight.is_contiguous() or not available(weight.dtype):
            self._forward = self._backward = None
            return None
        # Merging an adapter writes into a weight that stays where it is, unseen by autograd. By an
        # even step the same few columns would be looked at.
        step = weight.numel() // LOOKED_AT | 1
        numbers = weight.detach().view(-1)[::step]
        if (
            self._numbers is None
            or self._place != weight.data_ptr()
            or not torch.equal(self._numbers, numbers)
        ):
            self._forward = self._backward = None
            self._numbers, self._place = numbers.clone(), weight.data_ptr()
        return self

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias of x, shape (N, in), and of the weight that `of` was given."""
        laid_out = self._forward
        if laid_out is None:
            laid_out = self._forward = _laid_out(weight)
        return _multiplied(x, laid_out, bias)

    def back(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Return g W of g, shape (N, out)."""
        laid_out = self._backward
        if laid_out is None:
            laid_out = self._backward = _laid_out(weight.T)
        return _multiplied(grad, laid_out, None)


def _laid_out(weight: Tensor) -> Tensor:
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
    return made


def _multiplied(x: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), laid_out, bias, "none", [], ""
    )
    return made
