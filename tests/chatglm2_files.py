"""Tiny random ChatGLM2 checkpoints as the original program writes them, of any shape.

Names, config keys and layouts are spelled out here once more, on purpose: this is what the
conversion is tested against, so it shares no line with `llm_emo.models.chatglm2`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

SIZES: dict[str, int] = {
    "layers": 2,
    "hidden": 40,
    "ffn": 56,
    "heads": 6,
    "groups": 3,
    "head_dim": 16,
    "vocab": 512,  # room for the ids of `chatglm2_tokens`
    "positions": 256,
}
"""A shape in which hidden, query, key and ffn sizes all differ; any can be overridden."""

Kind = Literal["bin", "safetensors"]


def config(*, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Any]:
    """Return the `config.json` of a checkpoint, with the keys and switches of the official one."""
    given = _sizes(sizes)
    return {
        "_name_or_path": "THUDM/chatglm2-6b",
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        },
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": given["ffn"],
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": given["hidden"],
        "kv_channels": given["head_dim"],
        "layernorm_epsilon": 1e-05,
        "multi_query_attention": True,
        "multi_query_group_num": given["groups"],
        "num_attention_heads": given["heads"],
        "num_layers": given["layers"],
        "original_rope": True,
        "padded_vocab_size": given["vocab"],
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": given["positions"],
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.27.1",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def tensors(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int
) -> dict[str, Tensor]:
    """Return the random weights of a checkpoint under the original's names, in its order.

    They are far from the usual small initial ones, so that a wrong order of rows or a wrong
    rotation changes the logits by more than rounding.
    """
    s = _sizes(sizes)
    queries, keys = s["heads"] * s["head_dim"], s["groups"] * s["head_dim"]
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, spread: float | None = None) -> Tensor:
        noise = torch.randn(rows, columns, generator=generator)
        return noise * (1.5 / columns**0.5 if spread is None else spread)

    def vector(size: int, around: float) -> Tensor:
        return around + 0.2 * torch.randn(size, generator=generator)

    made = {
        "embedding.word_embeddings.weight": matrix(s["vocab"], s["hidden"], 0.3),
        "rotary_pos_emb.inv_freq": inverse_frequencies(s["head_dim"]),
    }
    for layer in range(s["layers"]):
        made |= {
            f"encoder.layers.{layer}.{name}": tensor
            for name, tensor in {
                "input_layernorm.weight": vector(s["hidden"], 1.0),
                "self_attention.query_key_value.weight": matrix(queries + 2 * keys, s["hidden"]),
                "self_attention.query_key_value.bias": vector(queries + 2 * keys, 0.0),
                "self_attention.dense.weight": matrix(s["hidden"], queries),
                "post_attention_layernorm.weight": vector(s["hidden"], 1.0),
                "mlp.dense_h_to_4h.weight": matrix(2 * s["ffn"], s["hidden"]),
                "mlp.dense_4h_to_h.weight": matrix(s["hidden"], s["ffn"]),
            }.items()
        }
    made["encoder.final_layernorm.weight"] = vector(s["hidden"], 1.0)
    made["output_layer.weight"] = matrix(s["vocab"], s["hidden"])
    return {f"transformer.{name}": tensor.to(dtype) for name, tensor in made.items()}


def inverse_frequencies(head_dim: int) -> Tensor:
    """Return the rotary frequencies of the first half of a head, base 10000."""
    half = head_dim // 2
    return 1.0 / (10000 ** (torch.arange(0, half, 2) / half))


def write_checkpoint(
    folder: Path,
    *,
    shards: int = 1,
    kind: Kind = "bin",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **sizes: int,
) -> Path:
    """Write a checkpoint folder: config.json, weights, and an index where there are shards.

    Args:
        folder: made if absent.
        shards: number of weight files; with one there is no index, as in the official folders.
        kind: `.bin` files of `torch.save`, or safetensors.
        seed: of the weights.
        dtype: of the weights.
        sizes: overrides of `SIZES`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config(dtype=dtype, **sizes))
    write_weights(folder, tensors(seed=seed, dtype=dtype, **sizes), shards=shards, kind=kind)
    return folder


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write config.json as the original spells it."""
    (folder / "config.json").write_text(json.dumps(values, indent=2), "utf-8")


def write_weights(
    folder: Path, named: Mapping[str, Tensor], *, shards: int = 1, kind: Kind = "bin"
) -> list[Path]:
    """Write weights into `shards` files; return the files."""
    stem, suffix = ("pytorch_model", "bin") if kind == "bin" else ("model", "safetensors")
    names = list(named)
    size = -(-len(names) // shards)
    parts = [names[at : at + size] for at in range(0, len(names), size)]
    files = [
        folder / (f"{stem}.{suffix}" if len(parts) == 1 else
                  f"{stem}-{number:05d}-of-{len(parts):05d}.{suffix}")
        for number in range(1, len(parts) + 1)
    ]  # fmt: skip
    for file, part in zip(files, parts, strict=True):
        own = {name: named[name].clone() for name in part}
        if kind == "bin":
            torch.save(own, file)
        else:
            save_file(own, file, {"format": "pt"})
    if len(parts) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in named.values())
        where = {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), "utf-8")
    return files


def logits(values: Mapping[str, Any], named: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Return what the original computes, in float32, one sequence at a time.

    Written from the description of the architecture, without a module of transformers; that it
    is the original is held by a test against logits which the original's own code produced.

    Args:
        values: the checkpoint's config.
        named: its weights, under the original's names.
        ids: token ids, shape (L,).

    Returns:
        Shape (L, V).
    """
    heads, groups = values["num_attention_heads"], values["multi_query_group_num"]
    size, length = values["kv_channels"], len(ids)
    queries, keys = heads * size, groups * size

    def weight(name: str) -> Tensor:
        return named[f"transformer.{name}"].float()

    def norm(x: Tensor, name: str) -> Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        return weight(f"{name}.weight") * x * torch.rsqrt(mean + values["layernorm_epsilon"])

    angles = torch.arange(length).float()[:, None] * inverse_frequencies(size)  # (L, size / 4)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (L, 1, size / 4)

    def rotate(x: Tensor) -> Tensor:  # (L, n, size): the first half in neighbouring pairs
        first, rest = x.chunk(2, -1)
        pairs = torch.view_as_complex(first.reshape(*first.shape[:-1], -1, 2))
        return torch.cat((torch.view_as_real(pairs * turn).flatten(-2), rest), -1)

    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    x = weight("embedding.word_embeddings.weight")[ids]  # (L, H)
    for layer in range(values["num_layers"]):
        at = f"encoder.layers.{layer}"
        mixed = norm(x, f"{at}.input_layernorm") @ weight(
            f"{at}.self_attention.query_key_value.weight"
        ).T + weight(f"{at}.self_attention.query_key_value.bias")
        q, k, v = mixed.split([queries, keys, keys], -1)
        q, k = rotate(q.view(length, heads, size)), rotate(k.view(length, groups, size))
        k, v = (
            part.view(length, groups, size).repeat_interleave(heads // groups, 1) for part in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5  # (heads, L, L)
        shares = scores.masked_fill(future, float("-inf")).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", shares, v).flatten(1)
        x = x + mixed @ weight(f"{at}.self_attention.dense.weight").T
        gate, up = (
            norm(x, f"{at}.post_attention_layernorm") @ weight(f"{at}.mlp.dense_h_to_4h.weight").T
        ).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ weight(f"{at}.mlp.dense_4h_to_h.weight").T
    return norm(x, "encoder.final_layernorm") @ weight("output_layer.weight").T


def _sizes(given: Mapping[str, int]) -> dict[str, int]:
    if unknown := given.keys() - SIZES.keys():
        raise ValueError(f"unknown sizes {sorted(unknown)}; known: {sorted(SIZES)}")
    return SIZES | given
