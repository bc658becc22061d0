"""How many operations a step needs, and how fast this machine multiplies matrices of its shapes.

Operations are those that no exact implementation can leave out, counted from distinct tokens: two
for each multiply-add of the frozen linear layers, forward and, in training, backward to their
inputs; of the adapter, whose weights have gradients too; of the head at the nodes with targets;
of attention along each token's own path. The last layer's states are needed where there are
logits only; of all other tokens it needs keys and values. Norms, activations, softmax, rotations
and the optimiser are not counted, although they take time. Padding and repeated beginnings are
not counted either: who computes them reaches less of the machine's rate.

Letters: N nodes, T nodes with logits.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

KEYS_AND_VALUES = ("k_proj", "v_proj", "qkv_proj", "query_key_value")
"""Layers that the last block, too, runs over all nodes."""

FIRST_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
"""Layers that read the embeddings in the first block: frozen, they need no gradient there."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of the base model: name, inputs, outputs, rank of its LoRA (0: none)."""

    name: str
    inputs: int
    outputs: int
    rank: int
    first: bool
    """Whether it reads the embeddings."""
    last: bool
    """Whether only nodes with logits need it."""

    @property
    def products(self) -> int:
        """Multiply-adds of one token."""
        return self.inputs * self.outputs


def linears(model: Any) -> tuple[list[Linear], Linear]:
    """Return the base model's linear layers in the order of their modules, and the head."""
    from torch import nn

    found: list[Linear] = []
    behind = f".layers.{model.config.get_text_config().num_hidden_layers - 1}."
    head = head_of(model)
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", module)
        if name.endswith(".base_layer") or not isinstance(base, nn.Linear) or base is head:
            continue
        if ".lora_" in name or "encoder.transform" in name:
            continue
        ranks = getattr(module, "r", {})
        short = name.rpartition(".")[2]
        found.append(
            Linear(
                name=name,
                inputs=base.in_features,
                outputs=base.out_features,
                rank=sum(ranks.values()) if isinstance(ranks, dict) else 0,
                first=short in FIRST_INPUTS and ".layers.0." in name,
                last=short not in KEYS_AND_VALUES and behind in name,
            )
        )
    return found, Linear("head", head.in_features, head.out_features, 0, first=False, last=True)


def head_of(model: Any) -> Any:
    """Return the layer that gives the vocabulary's logits."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return model.base.get_output_embeddings() if head is None else head


def operations(
    model: Any, depths: Sequence[int], read: Sequence[int], *, prefix: int = 0, training: bool
) -> dict[str, float]:
    """Count the operations of a pass, by kind.

    Args:
        model: The adapted model, or a bare one.
        depths: Of every distinct token.
        read: Depths of those that need logits.
        prefix: What all of them attend to besides.
        training: Whether gradients are computed.
    """
    layers, head = linears(model)
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = pairs_in(depths, prefix) * (config.num_hidden_layers - 1) + pairs_in(read, prefix)
    frozen = adapter = 0
    for layer in layers:
        rows = len(read) if layer.last else len(depths)
        frozen += rows * layer.products * (2 if training and not layer.first else 1)
        # Gradients of both LoRA matrices and of their inputs, beside the forward products.
        adapter += rows * (
            layer.rank * (layer.inputs + layer.outputs) * (3 if training else 1)
            - (layer.rank * layer.inputs if training and layer.first else 0)
        )
    return {
        "linear": 2.0 * frozen,
        "adapter": 2.0 * adapter,
        "head": 2.0 * len(read) * head.products * (2 if training else 1),
        # Scores and values; backward, a product for each of both factors of each.
        "attention": 4.0 * pairs * config.num_attention_heads * width * (3 if training else 1),
    }


def pairs_in(depths: Sequence[int], prefix: int = 0) -> int:
    """Count what all nodes attend to: as much as they lie deep, and a prefix."""
    return sum(depth + 1 + prefix for depth in depths)


def products_of(model: Any) -> Iterator[tuple[Linear, Any]]:
    """Yield the frozen products of a pass in their order, each with its `projections.Group`.

    Layers that read one input are one product where this program computes them as one.
    """
    import torch

    from llm_emo import decoder_layer, projections

    def alone(layer: Linear, module: Any, packed: Any = None) -> tuple[Linear, Any]:
        weight = getattr(module, "base_layer", module).weight.detach()
        # Quantised ones are written out at every product.
        if weight.shape != (layer.outputs, layer.inputs) or not weight.is_floating_point():
            weight = torch.randn(layer.outputs, layer.inputs, dtype=dtype, device=weight.device)
        return layer, projections.Group(
            weight, None, (layer.outputs,), (0,), 1.0, weight.dtype, packed=packed, compiled=False
        )

    layers, head = linears(model)
    dtype = head_of(model).weight.dtype
    modules = dict(model.named_modules())
    single = {id(modules[layer.name]): layer for layer in layers}
    joined: dict[int, tuple[Linear, Any] | None] = {}
    for decoder in decoder_layer.written_out(model):
        kept = getattr(decoder.forward, "keywords", {}).get("packed")
        inputs = decoder_layer.by_input(decoder)
        groups = None
        if kept and projections.base_of(inputs[0][0]).weight.device.type == "cpu":
            groups = decoder_layer.groups_of(decoder, kept)
        if groups is None:
            continue
        for members, group in zip(inputs, groups, strict=True):
            parts = [single[id(member)] for member in members]
            one = replace(
                parts[0],
                outputs=sum(part.outputs for part in parts),
                last=all(part.last for part in parts),
            )
            joined |= {id(member): None for member in members} | {id(members[0]): (one, group)}
    for layer in layers:
        module = modules[layer.name]
        found = joined[id(module)] if id(module) in joined else alone(layer, module)
        if found:
            yield found
    module = head_of(model)
    kept = getattr(module.forward, "keywords", {}).get("packed")
    yield alone(head, module, kept and kept.of(module.weight.detach()))


class Products:
    """The matrix products of a pass and nothing else, to be timed beside it.

    All frozen linear layers in their order, as this program multiplies them: those that read one
    input as one, by copies of weights where it keeps them, each with its own weights (so that they
    come from memory as they do in a step); over as many rows as there are nodes that need them; the
    head over those with logits; in training all of them backward to their inputs too.

    Args:
        model: The adapted model, or a bare one.
        nodes: Rows of most layers.
        logits: Rows of the head, and of the last layer behind its keys and values.
        training: Whether gradients are computed.
    """

    def __init__(self, model: Any, *, nodes: int, logits: int, training: bool) -> None:
        import torch

        from llm_emo import projections

        self.sizes = {"nodes": nodes, "logits": max(logits, 1)}
        self.operations = 0.0
        self._calls: list[Callable[[], Any]] = []
        behind: list[Callable[[], Any]] = []
        ready: dict[tuple[int, int, Any], Any] = {}
        for layer, group in products_of(model):
            rows, like = self.sizes["logits" if layer.last else "nodes"], group.weight
            for size in (layer.inputs, layer.outputs):
                if (rows, size, like.dtype) not in ready:
                    ready[rows, size, like.dtype] = torch.randn(
                        rows, size, dtype=like.dtype, device=like.device
                    )
            states, gradients = (
                ready[rows, size, like.dtype] for size in (layer.inputs, layer.outputs)
            )
            self._calls.append(partial(projections.product, states, group))
            if training and not layer.first:
                behind.append(partial(projections.back, gradients, group))
            self.operations += 2.0 * rows * layer.products * (1 + (training and not layer.first))
        self._calls += behind

    def seconds(self) -> float:
        """Compute them once, and return the time that it took."""
        import torch

        from common.harness import synchronise

        with torch.inference_mode():
            synchronise()
            started = time.perf_counter()
            for call in self._calls:
                call()
            synchronise()
            return time.perf_counter() - started

    def several(self, repeats: int = 5) -> list[float]:
        """Compute them several times after once for warming up; return the seconds of each."""
        return [self.seconds() for _ in range(repeats + 1)][1:]

    def rate(self, seconds: Sequence[float]) -> dict[str, Any]:
        """Return the operations per second that these times say, for a benchmark's record."""
        return {
            "operations_per_second": self.operations / statistics.mean(seconds),
            "products_seconds": list(seconds),
            "measured_at": self.sizes,
        }


def depths_in(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the depths of all nodes of sequences' trie."""
    from llm_emo.trie import TokenTrie

    depths: list[int] = TokenTrie.build(sequences).depth.tolist()
    return depths


def of_step(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, prefix: int = 0
) -> tuple[dict[str, float], int, int]:
    """Count a training step over rows (prompt, answer); return operations, nodes, logits."""
    depths = depths_in([(*prompt, *answer[:-1]) for prompt, answer in rows])
    read = {(*prompt, *answer[:at]) for prompt, answer in rows for at in range(len(answer))}
    counted = operations(
        model, depths, [len(tokens) - 1 for tokens in read], prefix=prefix, training=True
    )
    return counted, len(depths), len(read)


def of_training(model: Any, recipe: Any, steps: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Count what steps of encoded rows need: all operations by kind, and each step's sizes."""
    prefix = getattr(recipe.method, "prefix_length", 0)
    counted = [
        of_step(model, [(row.prompt, row.answer) for row in step], prefix=prefix) for step in steps
    ]
    kinds = {kind: sum(step[0][kind] for step in counted) for kind in counted[0][0]}
    sizes = {"nodes": [step[1] for step in counted], "logits": [step[2] for step in counted]}
    return {"operations": kinds, **sizes}


def products_of_training(model: Any, needed: Mapping[str, Any]) -> Products:
    """Return the products of the median of the steps that `of_training` counted."""
    sizes = sorted(zip(needed["nodes"], needed["logits"], strict=True))
    nodes, logits = sizes[len(sizes) // 2]
    return Products(model, nodes=nodes, logits=logits, training=True)


def of_scoring(
    model: Any,
    groups: Iterator[Sequence[Sequence[int]]],
    answers: Sequence[Sequence[int]],
    *,
    prefix: int = 0,
) -> tuple[float, list[tuple[int, int]]]:
    """Count scoring of groups of prompts, a pass each; return operations, (nodes, logits) each."""
    total, sizes = 0.0, []
    for prompts in groups:
        depths = depths_in([(*p, *a[:-1]) for p in prompts for a in answers])
        read = {(*p, *a[:at]) for p in prompts for a in answers for at in range(len(a))}
        counted = operations(
            model, depths, [len(tokens) - 1 for tokens in read], prefix=prefix, training=False
        )
        total += sum(counted.values())
        sizes.append((len(depths), len(read)))
    return total, sizes
