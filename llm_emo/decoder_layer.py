"""A decoder layer of Llama's form over a trie in pieces, as one autograd function.

At a few hundred distinct tokens on two cores, going through a layer's modules, casts, additions and
some hundred autograd nodes is a large share of a step. Written out, forward and backward, a layer
is its products and little else. Projections that read one input are one product (`projections.py`),
and norms, gates and rotary embeddings take few passes over memory.

Of the last layer, states are used only at nodes whose logits are asked for; all other nodes serve
them as keys and values. So what stands behind its attention runs at those nodes only; queries run
at all of them, because gathering would cost as much.

It serves passes with `branches` (see there; those of this program on a CPU), and by a mask those
from which nothing is learned, through layers whose base is frozen; whatever else comes is the
layer's own forward's. That both are equal, gradients included, is held by
tests/test_decoder_layer.py for every class in `KINDS`.

Letters: N nodes, T those whose state is read, E hidden size, H heads, G key-value heads, D head
dimension, P prefix length.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from llm_emo import attention as masks
from llm_emo import branches as pieces
from llm_emo import machine
from llm_emo.branches import Branches
from llm_emo.lean import gated, gated_backward, normed, normed_backward, rotate
from llm_emo.packed import Packed, available, worthwhile
from llm_emo.projections import (
    Group,
    are_alike,
    are_one,
    base_of,
    group_of,
    learned,
    project,
    stacked,
    unproject,
)

KINDS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)
"""Norm, attention with rotary embeddings, norm, gated SiLU; residuals around both."""


def write_out(model: nn.Module) -> None:
    """Let layers of these kinds be one function each, and the head read a copy of its weight."""
    layers = written_out(model)
    kept = packed_bytes(model) > 0
    for layer in layers:
        inputs = by_input(layer)
        packed = tuple(Packed() if kept else None for _ in inputs)
        layer.forward = partial(_forward, layer, packed=packed, known=_Known())
        for group in inputs:
            bases = [base_of(one) for one in group]
            # On a GPU no pass comes in pieces.
            if are_alike(bases) and not bases[0].weight.is_cuda:
                stacked(bases)
    if kept and (head := head_of(model)) is not None:
        head.forward = partial(_logits, head, packed=Packed())
    machine.trim()  # of the weights that are parts of a stack now


class _Known:
    """What is known of a layer's projections while nobody changes them.

    What is copied or pickled of it is empty again.
    """

    def __init__(self) -> None:
        self.kept = False
        self.groups: dict[bool, tuple[Group, ...] | None] = {}
        """In training, where dropout is at work, and not."""

    def __reduce__(self) -> tuple[type["_Known"], tuple[()]]:
        return _Known, ()


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Look at each layer's projections once.

    Until the end nobody may touch frozen weights, nor merge, switch or disable an adapter; what an
    adapter has learned may change. Else every pass asks for all that. In the cold caches that
    products leave it is two hundredths of a step.
    """
    found = [
        layer.forward.keywords["known"] for layer in written_out(model)
        if isinstance(layer.forward, partial)
    ]  # fmt: skip
    for known in found:
        known.kept = True
    try:
        yield
    finally:
        for known in found:
            known.kept = False
            known.groups.clear()


def written_out(model: nn.Module) -> list[Any]:
    """Return the layers that this module serves."""
    return [
        module for module in model.modules()
        if isinstance(module, KINDS) and _is_gated_by_silu(module.mlp)
    ]  # fmt: skip


def head_of(model: nn.Module) -> Any:
    """Return the linear layer over the vocabulary that is frozen, or None."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            head = module.get_output_embeddings()
            if head is not None and are_alike([head]) and head.bias is None:
                return head
    return None


def packed_bytes(model: nn.Module) -> int:
    """Return the bytes of one copy of all weights of which copies are kept (see `packed`)."""
    groups = [
        [base_of(one) for one in group] for layer in written_out(model) for group in by_input(layer)
    ]
    weights = [base.weight for bases in groups if are_alike(bases) for base in bases]
    if weights and (head := head_of(model)) is not None:
        weights.append(head.weight)
    size = sum(weight.nbytes for weight in weights)
    kept = all(available(weight.dtype) for weight in weights) and worthwhile(size)
    return size if kept else 0


def _is_gated_by_silu(mlp: Any) -> bool:
    return isinstance(mlp.act_fn, nn.SiLU | SiLUActivation)


@dataclass(frozen=True)
class _Pass:
    """What of a pass and a layer is no leaf of the gradient."""

    branches: Branches | None
    mask: Tensor | None
    """Who sees whom, where the trie is not in pieces."""
    attention: Any
    """The layer's module, for its number and its kind."""
    cos: Tensor
    """Shape (N, 1, D), as `sin`."""
    sin: Tensor
    attention_scale: float
    norms: tuple[tuple[Tensor, float], tuple[Tensor, float]]
    inputs: tuple[Group, ...]
    """The projections by the input they read: q, k, v; o; gate, up; down."""
    cache: Cache | None
    read: Tensor | None
    """The nodes whose state is read, each once, shape (T,); None: all of them."""
    learning: bool
    """Whether there will be a backward pass; inside an autograd function nobody can tell."""


def _forward(
    self: Any,
    hidden_states: Tensor,
    *args: Any,
    packed: Sequence[Packed | None],
    known: _Known,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    past_key_values: Cache | None = None,
    branches: Branches | None = None,
    prefix: Sequence[Tensor] | None = None,
    read: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    attention = self.self_attn
    norms = (self.input_layernorm, self.post_attention_layernorm)
    groups = None
    # Not in pieces come steps of generating and small passes: written out where nothing is learned.
    masked = (
        branches is None
        and attention_mask is not None
        and len(hidden_states) == 1
        and hidden_states.device.type == "cpu"
        and attention.config._attn_implementation == masks.NAME
        and not torch.is_grad_enabled()
        and not (self.training and attention.attention_dropout)
    )
    if not (
        (branches is None and not masked)
        or position_embeddings is None
        or (self.gradient_checkpointing and self.training)
        or any(norm.weight.requires_grad for norm in norms)
        or (past_key_values is not None and torch.is_grad_enabled())
    ):
        if self.training in known.groups:
            groups = known.groups[self.training]
        else:
            groups = groups_of(self, packed)
            if known.kept:
                known.groups[self.training] = groups
    if groups is None or position_embeddings is None:
        out: Tensor = type(self).forward(
            self,
            hidden_states,
            *args,
            attention_mask=attention_mask,
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
        attention_mask,
        attention,
        cos,
        sin,
        attention.scaling,
        (
            (norms[0].weight, norms[0].variance_epsilon),
            (norms[1].weight, norms[1].variance_epsilon),
        ),
        groups,
        past_key_values,
        read if attention.layer_idx == attention.config.num_hidden_layers - 1 else None,
        torch.is_grad_enabled(),
    )
    adapters = [
        part["default"].weight
        for group in by_input(self)
        for layer in group
        if isinstance(layer, LoraLinear)
        for part in (layer.lora_A, layer.lora_B)
    ]
    own = hidden_states.new_empty(0, 2, 1, attention.head_dim)
    if prefix is not None:
        own = prefix[attention.layer_idx]
    else:
        own = own.expand(-1, -1, what.inputs[0].sizes[1] // attention.head_dim, -1)
    written: Tensor = _Layer.apply(hidden_states[0], own, what, *adapters)  # type: ignore[no-untyped-call]
    return written[None]


def groups_of(layer: Any, packed: Sequence[Packed | None]) -> tuple[Group, ...] | None:
    """Return a decoder layer's projections by input; None where those of one are not alike."""
    inputs = by_input(layer)
    if not all(are_one(layers) for layers in inputs):
        return None
    return tuple(group_of(layers, own) for layers, own in zip(inputs, packed, strict=True))


def by_input(layer: Any) -> tuple[tuple[Any, ...], ...]:
    """Return a decoder layer's projections by the input they read."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )


def _logits(self: Any, x: Tensor, *, packed: Packed) -> Tensor:
    weight = self.weight
    if (
        weight.requires_grad
        or x.dtype != weight.dtype
        or (own := packed.of(weight)) is None
        or torch.is_autocast_enabled("cpu")
    ):
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    made: Tensor = _Logits.apply(x.flatten(0, -2), weight, own)  # type: ignore[no-untyped-call]
    return made.view(*x.shape[:-1], len(weight))


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, packed: Packed) -> Tensor:
        ctx.weight, ctx.packed = weight, packed
        return packed.product(x, weight, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.packed.back(grad, ctx.weight), None, None


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, prefix: Tensor, what: _Pass, *adapters: Tensor) -> Tensor:
        rest = iter(adapters)
        own = [[next(rest) for rank in group.ranks if rank for _ in "AB"] for group in what.inputs]
        through = partial(project, learning=what.learning)
        qkv, o, gate_up, down = what.inputs
        groups, turning = prefix.shape[2], sum(qkv.sizes[:2])

        first, first_scale = normed(x, *what.norms[0])
        heads, qkv_kept = through(first, qkv, own[0])
        rotate(heads[:, :turning], what.cos, what.sin)
        q, both = heads[:, : qkv.sizes[0]], heads[:, qkv.sizes[0] :]
        saved: Sequence[Tensor] = ()
        if what.branches is None:
            attended = _masked(q, both, prefix, what)
        else:
            before = prefix.permute(1, 2, 0, 3).flatten(0, 1)  # (2G, P, D)
            if what.cache is not None:
                before = torch.cat([before, _remembered(what, both, groups)], 1)
            attended, saved = pieces.forward(
                q, both, before, what.branches, what.attention_scale, learning=what.learning
            )
        del heads, q, both
        if not what.learning:  # scores are the largest of all that a layer computes
            del saved, first
        if what.read is not None:
            attended = attended.index_select(0, what.read)  # (T, H*D)
        middle, o_kept = through(attended, o, own[1])
        middle.add_(x if what.read is None else x.index_select(0, what.read))

        second, second_scale = normed(middle, *what.norms[1])
        opening, gate_up_kept = through(second, gate_up, own[2])  # gate, up
        out, down_kept = through(gated(opening), down, own[3])
        out.add_(middle)

        if what.read is not None:
            out = torch.zeros_like(x).index_copy_(0, what.read, out)
        if not what.learning:
            return out
        kept = (qkv_kept, o_kept, gate_up_kept, down_kept)
        ctx.save_for_backward(
            x, first_scale, middle, second_scale, opening, *saved,
            *(part for group in kept for part in group),
        )  # fmt: skip
        ctx.what, ctx.kept = what, [len(group) for group in kept]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        what: _Pass = ctx.what
        x, first_scale, middle, second_scale, opening, *rest = ctx.saved_tensors
        saved, parts = rest[:4], iter(rest[4:])
        kept = [tuple(next(parts) for _ in range(length)) for length in ctx.kept]
        qkv, o, gate_up, down = zip(what.inputs, kept, strict=True)
        assert what.branches is not None  # by a mask nothing is learned
        found: list[list[Tensor]] = [[], [], [], []]
        if what.read is not None:
            grad = grad.index_select(0, what.read)

        product, found[3] = unproject(grad, *down)
        second, found[2] = unproject(gated_backward(product, opening), *gate_up)
        dmiddle = normed_backward(second, middle, what.norms[1][0], second_scale, grad)

        dattended, found[1] = unproject(dmiddle, *o)
        if what.read is not None:
            dattended = dattended.new_zeros(len(x), dattended.shape[1]).index_copy_(
                0, what.read, dattended
            )
        heads, before = pieces.backward(
            dattended, (saved[0], saved[1], saved[2], saved[3]), what.branches, what.attention_scale
        )
        rotate(heads[:, : sum(qkv[0].sizes[:2])], what.cos, what.sin, back=True)
        dx = None
        if ctx.needs_input_grad[0]:
            first, found[0] = unproject(heads, *qkv)
            straight = dmiddle if what.read is None else None
            dx = normed_backward(first, x, what.norms[0][0], first_scale, straight)
            if what.read is not None:
                dx.index_add_(0, what.read, dmiddle)
        else:  # the first layer reads frozen embeddings
            found[0] = learned(heads, *qkv)

        dprefix = before.view(2, len(before) // 2, *before.shape[1:]).permute(2, 0, 1, 3)
        return dx, dprefix, None, *(part for group in found for part in group)


def _remembered(what: _Pass, both: Tensor, groups: int) -> Tensor:
    """Put keys, then values, (N, 2G*D), into the cache; return what stood there, (2G, A, D)."""
    keys, values = _put(what, both, groups)
    front = keys.shape[2] - len(both)
    return torch.cat([keys[0, :, :front], values[0, :, :front]])


def _put(what: _Pass, both: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return all keys and values, (1, G, A + N, D), with those that are new."""
    own = both.view(len(both), 2, groups, -1).permute(1, 2, 0, 3)  # (2, G, N, D)
    if what.cache is None:
        return own[:1], own[1:]
    keys, values = what.cache.update(own[:1], own[1:], what.attention.layer_idx)
    return keys, values


def _masked(q: Tensor, both: Tensor, prefix: Tensor, what: _Pass) -> Tensor:
    """Attend from (N, H*D) by the mask; return the same shape."""
    keys, values = _put(what, both, prefix.shape[2])
    queries = q.view(len(q), -1, keys.shape[-1]).transpose(0, 1)[None]  # (1, H, N, D)
    number, scale = what.attention.layer_idx, what.attention_scale
    front = {number: prefix} if len(prefix) else None
    attended, _ = masks.attend_by_mask(
        what.attention, queries, keys, values, what.mask, front, scaling=scale
    )
    return attended.reshape(q.shape)
