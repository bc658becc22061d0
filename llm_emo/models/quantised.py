"""Bases whose frozen weights are kept in four or eight bits, by bitsandbytes.

`nf4` is QLoRA's form (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): 4-bit NormalFloat
with double quantisation. `int8` keeps eight bits and one scale a row. In both the weights alone
are quantised: a product writes them out in the dtype of the activations, multiplies, and forgets
them. float16 takes no part in it.

That is not LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339), which
bitsandbytes would compute by itself: it rounds activations too, through float16, all but the
columns in which any token of the *pass* is large. A text's label would then depend on the texts
it shares a pass with, and on a CPU on whether the model is in training mode.

Letters: N rows (outputs), K columns (inputs).
"""

from typing import Any, Literal

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers import BitsAndBytesConfig


def config(kind: Literal["nf4", "int8"], dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return what transformers needs to load weights as `kind` and to compute in `dtype`."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def settle(model: nn.Module) -> None:
    """Make the quantised layers of `model` compute the same in training and in evaluation."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 a forward pass in eval mode repacks the weights in place,
            # and the next training step fails.
            module.support_avx512bf16_for_cpu = False
        elif type(module) is Linear8bitLt:
            module.__class__ = Linear8bit


class Linear8bit(Linear8bitLt):  # type: ignore[misc]
    """A frozen linear layer with int8 weights and activations as they come."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b in the dtype of x; shape (..., K) -> (..., N)."""
        if self.weight.CB is not None:
            self.init_8bit_state()
        product: Tensor = _Product.apply(x, self.state.CB, self.state.SCB)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(x.dtype)


class _Product(torch.autograd.Function):
    """x W^T for W = diag(scales) codes / 127.

    Codes are exact in bfloat16, so the scales are all that rounding is about; they multiply the
    product in float32. The gradient converts the codes once more instead of keeping them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return (nn.functional.linear(x, codes.to(x.dtype)) * (scales / 127)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        (given,) = gradients  # (..., N)
        scaled = (given * (scales / 127)).to(given.dtype)
        return scaled @ codes.to(given.dtype), None, None
