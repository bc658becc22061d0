"""A decoder layer of Llama's form over a trie in pieces, as one autograd function.

At a few hundred distinct tokens on two cores, going through a layer's modules, casts, additions and
some hundred autograd nodes is a large share of a step. Written out, forward and backward, a layer
is its products and little else: gradients of one input are added up by the products themselves,
the adapters of projections that read one input are one product, and
norms and rotary embeddings take few passes over memory.

Of the last layer, states are used only at nodes whose logits are asked for; all other nodes serve
them as keys and values. So what stands behind its attention runs at those nodes only; queries run
at all of them, because gathering would cost as much.

It serves passes with `branches` (see there; those of this program on a CPU) through layers whose
base is frozen; whatever else comes is the layer's own forward's. That both are equal, gradients
included, is held by tests/test_decoder_layer.py for every class in `KINDS`.

Letters: N nodes, T those whose state is read, E hidden size, H heads, G key-value heads, D head
dimension, P prefix length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import Cache
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from llm_emo import branches as pieces
from llm_emo.branches import Branches
from llm_emo.lean import normed, normed_backward, plain

KINDS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)
"""Norm, attention with rotary embeddings, norm, gated SiLU; residuals around both."""


def write_out(model: nn.Module) -> None:
    """Let every layer of these kinds take passes over a trie in pieces as one function."""
    for module in model.modules():
        if isinstance(module, KINDS) and _is_gated_by_silu(module.mlp):
            module.forward = partial(_forward, module)


def _is_gated_by_silu(mlp: Any) -> bool:
    return isinstance(mlp.act_fn, nn.SiLU | SiLUActivation)


@dataclass(frozen=True)
class _Linear:
    """A frozen projection; with LoRA, `scale` is that of its update, else None."""

    weight: Tensor
    bias: Tensor | None
    scale: float | None


@dataclass(frozen=True)
class _Pass:
    """What of a pass and a layer is no leaf of the gradient."""

    branches: Branches
    cos: Tensor
    """Shape (N, 1, D), as `sin`."""
    sin: Tensor
    attention_scale: float
    norms: tuple[tuple[Tensor, float], tuple[Tensor, float]]
    inputs: tuple[tuple[_Linear, ...], ...]
    """The projections by the input they read: q, k, v; o; gate, up; down."""
    cache: tuple[Cache, int] | None
    read: Tensor | None
    """The nodes whose state is read, each once, shape (T,); None: all of them."""
    learning: bool
    """Whether there will be a backward pass; inside an autograd function nobody can tell."""


def _forward(
    self: Any,
    hidden_states: Tensor,
    *args: Any,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    past_key_values: Cache | None = None,
    branches: Branches | None = None,
    prefix: Sequence[Tensor] | None = None,
    read: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    attention, mlp = self.self_attn, self.mlp
    inputs = (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
    norms = (self.input_layernorm, self.post_attention_layernorm)
    if (
        branches is None
        or position_embeddings is None
        or (self.gradient_checkpointing and self.training)
        or any(norm.weight.requires_grad for norm in norms)
        or not all(_is_plain(layer) for group in inputs for layer in group)
        or (past_key_values is not None and torch.is_grad_enabled())
    ):
        out: Tensor = type(self).forward(
            self,
            hidden_states,
            *args,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            branches=branches,
            prefix=prefix,
            **kwargs,
        )
        return out
    cos, sin = (part[0, :, None] for part in position_embeddings)
    what = _Pass(
        branches,
        cos,
        sin,
        attention.scaling,
        (
            (norms[0].weight, norms[0].variance_epsilon),
            (norms[1].weight, norms[1].variance_epsilon),
        ),
        tuple(tuple(_linear(layer) for layer in group) for group in inputs),
        None if past_key_values is None else (past_key_values, attention.layer_idx),
        read if attention.layer_idx == attention.config.num_hidden_layers - 1 else None,
        torch.is_grad_enabled(),
    )
    adapters = [
        part["default"].weight
        for group in inputs
        for layer in group
        if isinstance(layer, LoraLinear)
        for part in (layer.lora_A, layer.lora_B)
    ]
    own = hidden_states.new_empty(0, 2, 1, attention.head_dim)
    if prefix is not None:
        own = prefix[attention.layer_idx]
    else:
        own = own.expand(-1, -1, what.inputs[0][1].weight.shape[0] // attention.head_dim, -1)
    written: Tensor = _Layer.apply(hidden_states[0], own, what, *adapters)  # type: ignore[no-untyped-call]
    return written[None]


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) is LoraLinear:
        return type(layer.base_layer) is nn.Linear and plain(layer) and _is_plain(layer.base_layer)
    if type(layer) is not nn.Linear or layer.weight.requires_grad:
        return False
    return layer.bias is None or not layer.bias.requires_grad


def _linear(layer: Any) -> _Linear:
    if isinstance(layer, LoraLinear):
        base: Any = layer.base_layer
        return _Linear(base.weight, base.bias, layer.scaling["default"])
    return _Linear(layer.weight, layer.bias, None)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, prefix: Tensor, what: _Pass, *adapters: Tensor) -> Tensor:
        by_input = _share(what.inputs, adapters)
        qkv, o, gate_up, down = what.inputs
        groups = prefix.shape[2]

        first, first_scale = normed(x, *what.norms[0])
        (q, k, v), qkv_low = _project(first, qkv, by_input[0])
        q, k = (_turned(part, what.cos, what.sin) for part in (q, k))
        before = prefix.permute(1, 2, 0, 3).flatten(0, 1)  # (2G, P, D)
        if what.cache is not None:
            before = torch.cat([before, _remembered(what.cache, k, v, groups)], 1)
        attended, saved = pieces.forward(
            q, torch.cat([k, v], 1), before, what.branches, what.attention_scale
        )
        del q, k, v
        if not what.learning:  # scores are the largest of all that a layer computes
            del saved, first
        if what.read is not None:
            attended = attended.index_select(0, what.read)  # (T, H*D)
        (middle,), o_low = _project(attended, o, by_input[1])
        middle.add_(x if what.read is None else x.index_select(0, what.read))

        second, second_scale = normed(middle, *what.norms[1])
        (gate, up), gate_up_low = _project(second, gate_up, by_input[2])
        open_ = nn.functional.silu(gate)
        product = open_ * up
        (out,), down_low = _project(product, down, by_input[3])
        out.add_(middle)

        if what.read is not None:
            out = torch.zeros_like(x).index_copy_(0, what.read, out)
        if not what.learning:
            return out
        # An input is kept for the gradients of the adapters that read it only.
        kept = [
            part if group else None
            for part, group in zip((first, attended, second, product), by_input, strict=True)
        ]
        ctx.save_for_backward(
            x, first_scale, middle, second_scale, gate, up, open_, *saved, *kept,
            qkv_low, o_low, gate_up_low, down_low, *adapters,
        )  # fmt: skip
        ctx.what = what
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        what: _Pass = ctx.what
        x, first_scale, middle, second_scale, gate, up, open_, *rest = ctx.saved_tensors
        saved, kept, low, adapters = rest[:4], rest[4:8], rest[8:12], rest[12:]
        by_input = _share(what.inputs, adapters)
        found: list[list[Tensor]] = [[], [], [], []]
        if what.read is not None:
            grad = grad.index_select(0, what.read)

        product, found[3] = _unproject((grad,), what.inputs[3], by_input[3], kept[3], low[3])
        dup = product * open_
        dgate = torch.ops.aten.silu_backward(product.mul_(up), gate)
        second, found[2] = _unproject((dgate, dup), what.inputs[2], by_input[2], kept[2], low[2])
        dmiddle = normed_backward(second, middle, what.norms[1][0], second_scale).add_(grad)

        dattended, found[1] = _unproject((dmiddle,), what.inputs[1], by_input[1], kept[1], low[1])
        if what.read is not None:
            dattended = dattended.new_zeros(len(x), dattended.shape[1]).index_copy_(
                0, what.read, dattended
            )
        dq, dboth, before = pieces.backward(
            dattended, (saved[0], saved[1], saved[2], saved[3]), what.branches, what.attention_scale
        )
        dk, dv = dboth.chunk(2, 1)
        dq, dk = (_turned(part, what.cos, -what.sin) for part in (dq, dk))
        qkv = (dq, dk, dv), what.inputs[0], by_input[0], kept[0], low[0]
        dx = None
        if ctx.needs_input_grad[0]:
            first, found[0] = _unproject(*qkv)
            dx = normed_backward(first, x, what.norms[0][0], first_scale)
            dx = dx.add_(dmiddle) if what.read is None else dx.index_add_(0, what.read, dmiddle)
        else:  # the first layer reads frozen embeddings
            _, found[0] = _learned(*qkv)

        dprefix = before.view(2, len(before) // 2, *before.shape[1:]).permute(2, 0, 1, 3)
        return dx, dprefix, None, *(part for group in found for part in group)


_Adapters = list[tuple[int, Tensor, Tensor]]
"""Of the projections of one input that have an adapter: their place, A (r, in), B (out, r)."""


def _share(inputs: tuple[tuple[_Linear, ...], ...], adapters: Sequence[Tensor]) -> list[_Adapters]:
    """Hand the adapters, A and B in turn, to the projections that have one."""
    rest = iter(adapters)
    return [
        [
            (place, next(rest), next(rest))
            for place, linear in enumerate(group)
            if linear.scale is not None
        ]
        for group in inputs
    ]


def _project(
    x: Tensor, group: tuple[_Linear, ...], adapters: _Adapters
) -> tuple[list[Tensor], Tensor | None]:
    """Return every projection of `x`, and what it is in the adapters' ranks side by side."""
    outs = [nn.functional.linear(x, linear.weight, linear.bias) for linear in group]
    if not adapters:
        return outs, None
    low = x @ torch.cat([a for _, a, _ in adapters]).to(x.dtype).T  # (N, sum of ranks)
    for (place, _, b), part in zip(adapters, _parts(low, adapters), strict=True):
        outs[place].addmm_(part, b.to(x.dtype).T, alpha=group[place].scale or 0)
    return outs, low


def _unproject(
    grads: Sequence[Tensor],
    group: tuple[_Linear, ...],
    adapters: _Adapters,
    x: Tensor | None,
    low: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradient of the input, and those of the adapters, A and B in turn."""
    first, *others = zip(grads, group, strict=True)
    dx = first[0] @ first[1].weight
    for grad, linear in others:
        dx.addmm_(grad, linear.weight)
    dlow, found = _learned(grads, group, adapters, x, low)
    if dlow is not None:
        dx.addmm_(dlow, torch.cat([a for _, a, _ in adapters]).to(dx.dtype))
    return dx, found


def _learned(
    grads: Sequence[Tensor],
    group: tuple[_Linear, ...],
    adapters: _Adapters,
    x: Tensor | None,
    low: Tensor | None,
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradient of x A^T, shape (N, sum of ranks), and those of A and B in turn."""
    if x is None or low is None:
        return None, []
    dlow = torch.cat(
        [(grads[place] @ b.to(x.dtype)).mul_(group[place].scale or 0) for place, _, b in adapters],
        1,
    )
    da = torch.split((dlow.T @ x).to(adapters[0][1].dtype), [len(a) for _, a, _ in adapters])
    found: list[Tensor] = []
    for (place, _, b), part, own in zip(adapters, _parts(low, adapters), da, strict=True):
        db = (part.T @ grads[place]).T.to(b.dtype)
        found += [own, db.mul_(group[place].scale or 0)]
    return dlow, found


def _parts(low: Tensor, adapters: _Adapters) -> tuple[Tensor, ...]:
    return torch.split(low, [len(a) for _, a, _ in adapters], 1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads (N, X*D) by rotary embeddings, halves against halves."""
    heads = x.view(len(x), -1, cos.shape[-1])
    half = cos.shape[-1] // 2
    out = heads * cos
    out[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return out.flatten(1)


def _remembered(cache: tuple[Cache, int], k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Put keys and values, (N, G*D), into the cache; return what stood there, (2G, A, D)."""
    own = [part.view(len(part), groups, -1).transpose(0, 1)[None] for part in (k, v)]
    keys, values = cache[0].update(own[0], own[1], cache[1])
    front = keys.shape[2] - len(k)
    return torch.cat([keys[0, :, :front], values[0, :, :front]])
