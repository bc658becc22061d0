"""Layers of transformers and PEFT in fewer passes over memory, computing the same.

Next to a frozen base, a step of a few hundred distinct tokens spends much of its time outside
matrix products. Two layers cost most of what can be saved without touching an architecture:

- RMSNorm, written in eight operations whose float32 intermediates are kept for the backward pass;
  here one autograd function keeps the input and a number per token.
- LoRA over a base in bfloat16: PEFT turns the input into float32, and adds an update in float32
  to an output in bfloat16, which no vector unit does at speed. Here the adapter's matrices, which
  learn in float32, are rounded to the input's dtype for the products, as autocast does.

In float32 both are what they replace, to rounding. In bfloat16 there may be compiled loops that do
the same (`native.py`); in float32 norms and the loss are the very operations of transformers.
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from llm_emo import native


def lean(model: nn.Module) -> None:
    """Exchange the forward of every RMSNorm and LoRA layer of `model` that is of the usual form."""
    # Partials, not methods: those are pickled by their name in a class that has no such method.
    for module in model.modules():
        if _is_rms_norm(module):
            module.forward = partial(_rms_norm, module)
        elif type(module) is LoraLinear:
            module.forward = partial(_lora, module)


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether this is x / rms(x) * weight: all of transformers' that keep a `variance_epsilon`."""
    return type(module).__name__.endswith("RMSNorm") and set(vars(module)) >= {"variance_epsilon"}


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    if self.weight.requires_grad:
        return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
    out: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    """RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467) with a frozen weight.

    y = w * x / rms(x) over the last dimension; of g = dL/dy, with u = w * g and r = 1 / rms(x),
    dL/dx = r * (u - x * r^2 * mean(u * x)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, scale = normed(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return normed_backward(grad, *ctx.saved_tensors), None, None


def normed(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return w * x / rms(x), and 1 / rms(x), of shape (..., 1) in float32."""
    if x.dtype != torch.float32 and native.serves(x, weight):
        return native.rms_norm(x, weight, epsilon)
    y = x.float()
    # In float32 the very operations of transformers, so that not a bit differs.
    scale = y.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    # In float32 `y` is `x` itself, which others still read.
    y = y * scale if y is x else y.mul_(scale)
    return y.mul_(weight).to(x.dtype), scale


def normed_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, added: Tensor | None = None
) -> Tensor:
    """Return the gradient of `x`, from that of the normed and what `normed` returned.

    `added`, of the same shape, is a gradient of `x` from elsewhere.
    """
    others = (weight,) if added is None else (weight, added)
    if x.dtype != torch.float32 and native.serves(grad, x, *others):
        return native.rms_norm_backward(grad, x, weight, scale, added)
    u = grad.float()
    u = u * weight if u is grad else u.mul_(weight)
    y = x.float()
    share = torch.linalg.vecdot(u, y)[..., None].mul_(scale.square()).mul_(-1 / x.shape[-1])
    dx = u.addcmul_(y, share).mul_(scale).to(x.dtype)
    return dx if added is None else dx.add_(added)


def gated(opening: Tensor) -> Tensor:
    """Return silu(gate) * up of `opening`, shape (N, 2F): gate, then up."""
    if native.serves(opening):
        return native.gated(opening)
    gate, up = opening.chunk(2, -1)
    return nn.functional.silu(gate).mul_(up)


def gated_backward(grad: Tensor, opening: Tensor) -> Tensor:
    """Return the gradient of `opening`; `grad`, shape (N, F), may be written over."""
    if native.serves(grad, opening):
        return native.gated_backward(grad, opening)
    gate, up = opening.chunk(2, -1)
    dup = nn.functional.silu(gate).mul_(grad)
    return torch.cat([torch.ops.aten.silu_backward(grad.mul_(up), gate), dup], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
    """Turn heads, x (N, H*D), in place, by rotary embeddings (N, 1, D), or back.

    Halves are turned against halves. Each row of `x` is contiguous.
    """
    if native.serves(x, cos, sin):
        native.rotate(x, cos, sin, -1.0 if back else 1.0)
        return
    size, sign = cos.shape[-1], -1 if back else 1
    first, second = x.view(len(x), -1, size).chunk(2, -1)
    before = first.clone()
    first.mul_(cos[..., : size // 2]).addcmul_(second, sin[..., : size // 2], value=-sign)
    second.mul_(cos[..., size // 2 :]).addcmul_(before, sin[..., size // 2 :], value=sign)


def log_probabilities(logits: Tensor, rows: Tensor, words: Tensor) -> Tensor:
    """Return log P of `words`, shape (T,), each at a row of logits (K, V); (T,) in float32.

    A row is normalised once, and of the words only those asked for are read: a row of the
    vocabulary for every token would be copied several times, forward and backward.
    """
    if logits.dtype != torch.float32 and native.serves(logits):
        found: Tensor = _LogProbabilities.apply(logits, rows, words)  # type: ignore[no-untyped-call]
        return found
    return logits.log_softmax(-1, dtype=torch.float32)[rows, words]


class _LogProbabilities(torch.autograd.Function):
    """Of g = dL/dy, with G the sum of a row's, dL/dlogits = sum of g at the words - G softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, words: Tensor) -> Tensor:
        total = native.log_sum_exp(logits)
        found = logits[rows, words].float() - total[rows]
        ctx.save_for_backward(logits, total, rows, words, found)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, total, rows, words, found = ctx.saved_tensors
        share = torch.zeros_like(total).index_add_(0, rows, grad).neg_()
        dlogits = native.softmax_times(logits, total, share)
        # Where a word is all but certain, both terms are alike: they are rounded together.
        at, place = torch.unique(rows * logits.shape[1] + words, return_inverse=True)
        sums = torch.zeros(len(at)).index_add_(0, place, grad)
        softmax = torch.zeros(len(at)).index_copy_(0, place, share[rows] * found.exp())
        dlogits.view(-1)[at] = (sums + softmax).to(dlogits.dtype)
        return dlogits, None, None


def plain(layer: LoraLinear) -> bool:
    """Whether nothing but this program's one LoRA adapter, without dropout, is at work here."""
    return not (
        layer.disable_adapters
        or layer.merged
        or list(layer.active_adapters) != ["default"]
        or layer.lora_variant
        or layer.lora_bias["default"]
        or (layer.training and not isinstance(layer.lora_dropout["default"], nn.Identity))
    )


def _lora(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not plain(self):
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    out: Tensor = self.base_layer(x)
    down, up = (part["default"].weight.to(x.dtype) for part in (self.lora_A, self.lora_B))
    rows = x.flatten(0, -2)
    added = torch.addmm(out.flatten(0, -2), rows @ down.T, up.T, alpha=self.scaling["default"])
    return added.view_as(out)
