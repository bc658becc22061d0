"""Adaptation methods: how a base model is wrapped, and how what it learned is kept.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) is PEFT's own. P-Tuning v2 (Liu et al.
2021, https://arxiv.org/abs/2110.07602) is what PEFT calls prefix tuning: its parameters live in
PEFT's `PrefixEncoder`, but they are attended to *inside* attention instead of being injected
as a cache. The injection moves every token's position by the prefix length, forbids gradient
checkpointing, and breaks with each change of the cache classes; inside attention the prefix is
the un-rotated keys and values that ChatGLM2's own implementation has, tokens start at
position 0, and it composes with the token trie because every node may see it.

Letters: P prefix length, M layers, G key-value heads, D head dimension.
"""

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixEncoder,
    PrefixTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from llm_emo import attention, recipes
from llm_emo.errors import AdapterError, ModelError

PREFIX_FILE = "prefix_encoder.safetensors"


class PTuningV2Model(nn.Module):
    """A frozen causal LM with a trainable prefix of keys and values in every layer.

    `encoder` is PEFT's; its flat output (P, 2*M*G*D) is viewed as (P, 2M, G, D), where index
    2i holds the keys and 2i + 1 the values of layer i, as in the original's `PrefixEncoder`.
    """

    def __init__(self, base: PreTrainedModel, config: PrefixTuningConfig, dropout: float) -> None:
        super().__init__()
        base.requires_grad_(False)
        base.set_attn_implementation(attention.NAME)
        if base.config._attn_implementation != attention.NAME:
            raise ModelError(f"{base.config.model_type}: attention cannot be exchanged")
        self.base = base
        self.peft_config = config
        self.encoder = PrefixEncoder(config).to(base.device)
        self.dropout = nn.Dropout(dropout)

    @property
    def config(self) -> Any:
        """The base model's config."""
        return self.base.config

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute layers in the backward pass; the prefix is kept."""
        self.base.activation_checkpointing_enable(
            activation_checkpointing_kwargs, every_n_layers=every_n_layers, offload=offload
        )

    def prefix(self) -> Tensor:
        """Return the prefix, shape (P, 2M, G, D), before dropout."""
        config = self.peft_config
        tokens = torch.arange(config.num_virtual_tokens, device=self.base.device)
        heads, width = config.num_attention_heads, config.token_dim // config.num_attention_heads
        flat: Tensor = self.encoder(tokens[None])[0]
        return flat.view(config.num_virtual_tokens, 2 * config.num_layers, heads, width)

    def forward(self, **inputs: Any) -> Any:
        """Run the base model with the prefix in front of every layer's keys and values."""
        return self.base(**inputs, prefix=self.dropout(self.prefix()))


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has, and how many of them learn."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        return f"{self.trainable:,} of {self.total:,} parameters learn ({share:.4f} %)"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count parameters; those packed by bitsandbytes count as what they hold."""
    trainable = total = 0
    for parameter in model.parameters():
        number = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            number = 2 * number * parameter.element_size()
        total += number
        trainable += number if parameter.requires_grad else 0
    return ParameterCount(trainable, total)


def adapt(
    base: PreTrainedModel,
    method: recipes.Method,
    *,
    prefix_ids: Sequence[int] = (),
) -> nn.Module:
    """Wrap `base` so that the method's parameters, and no others, learn.

    Args:
        base: The causal LM.
        method: The recipe's method.
        prefix_ids: For P-Tuning v2 with `init: text`, the tokens whose keys and values start
            the prefix; repeated or cut to the prefix length.

    Raises:
        ModelError: a LoRA target module does not exist in this architecture.
    """
    base.config.use_cache = False
    if getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False):
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model: nn.Module
    match method:
        case recipes.ZeroShot():
            model = base.requires_grad_(False)
        case recipes.Full():
            model = base.requires_grad_(True)
        case recipes.Lora():
            model = _lora(base, method)
        case recipes.PTuningV2():
            model = _p_tuning_v2(base, method, prefix_ids)
    return model


def _lora(base: PreTrainedModel, method: recipes.Lora) -> PeftModel:
    linear = {
        name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, nn.Linear)
    }
    missing = [name for name in method.target_modules if name not in linear]
    if missing:
        raise ModelError(
            f"method.target_modules: {base.config.model_type} has no linear module called "
            f"{', '.join(missing)} (known: {', '.join(sorted(linear))})"
        )
    return get_peft_model(
        base,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            target_modules=list(method.target_modules),
            bias="none",
        ),
    )


def _p_tuning_v2(
    base: PreTrainedModel, method: recipes.PTuningV2, prefix_ids: Sequence[int]
) -> PTuningV2Model:
    text = base.config.get_text_config()
    heads = text.num_key_value_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=method.prefix_length,
        num_layers=text.num_hidden_layers,
        num_attention_heads=heads,
        token_dim=heads * width,
        num_transformer_submodules=1,
        prefix_projection=method.projection,
        encoder_hidden_size=method.projection_size or heads * width,
        base_model_name_or_path=base.name_or_path,
    )
    model = PTuningV2Model(base, config, method.dropout)
    if method.init == "text":
        if method.projection:
            raise ModelError(
                "method.init: text starts the prefix itself; with projection: true "
                "the prefix is an output, so take init: random"
            )
        if not prefix_ids:
            raise ModelError("method.init: text needs at least one token of method.init_text")
        ids = [prefix_ids[i % len(prefix_ids)] for i in range(method.prefix_length)]
        start = _keys_and_values(base, ids).flatten(1)
        model.encoder.embedding.weight.data.copy_(start)
    return model


@torch.no_grad()
def _keys_and_values(base: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Return the model's own keys and values of `ids`, shape (P, 2M, G, D), fp32.

    They are placed as if the text stood immediately in front of position 0, which is where an
    un-rotated prefix of length P sits after a rotation by -P.
    """
    cache = DynamicCache()
    tokens = torch.tensor([list(ids)], device=base.device)
    base(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        use_cache=True,
    )
    pairs = [part[0] for layer in cache.layers for part in (layer.keys, layer.values)]  # (G, P, D)
    prefix = torch.stack(pairs, dim=1).permute(2, 1, 0, 3).float()
    return rotate_keys(base, prefix, -len(ids))


@torch.no_grad()
def rotate_keys(base: PreTrainedModel, prefix: Tensor, by: int) -> Tensor:
    """Turn the keys of a prefix, shape (P, 2M, G, D), on by `by` positions.

    Rotary embeddings are rotations: token p of a model whose prefix fills positions 0..P-1
    stands at p + P, so a prefix turned on by P there means what the un-turned one means here.
    The architecture's own functions do it (partial and interleaved variants included).
    """
    apply = getattr(inspect.getmodule(type(base)), "apply_rotary_pos_emb", None)
    decoder = base.get_decoder()
    rotary = getattr(decoder, "rotary_emb", None)
    if apply is None or rotary is None:
        raise ModelError(
            f"{base.config.model_type} has no rotary position embedding; "
            "P-Tuning v2 here needs one (Llama, Qwen, Gemma, GLM families)"
        )
    text = base.config.get_text_config()
    per_kind = "layer_type" in inspect.signature(rotary.forward).parameters
    turned = prefix.clone()
    at = torch.full((1, prefix.shape[0]), abs(by), device=prefix.device)
    for layer in range(prefix.shape[1] // 2):
        kind = (text.layer_types[layer],) if per_kind else ()
        cos, sin = rotary(prefix, at, *kind)
        # Some variants scale cos and sin to sharpen attention; only the angle is wanted here.
        scale = (cos[..., :1] ** 2 + sin[..., :1] ** 2).sqrt()
        cos, sin = cos / scale, (sin if by > 0 else -sin) / scale
        keys = prefix[:, 2 * layer].transpose(0, 1)[None]  # (1, G, P, D)
        turned[:, 2 * layer] = apply(keys, keys, cos, sin)[0][0].transpose(0, 1).to(prefix.dtype)
    return turned


# --- what was learned, on disk --------------------------------------------------------------


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that learn, by name, on the CPU."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trainable_state(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Copy `state` into the parameters that learn; every name must fit.

    Raises:
        AdapterError: a tensor is missing, unexpected or misshapen: never leave one untouched.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    problems = [f"missing {name}" for name in own.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if problems:
        raise AdapterError(f"{source}: does not fit the model: {'; '.join(sorted(problems)[:5])}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def untrained(model: nn.Module) -> list[str]:
    """Return the LoRA B matrices that are still zero: layers that learned nothing."""
    return [
        name
        for name, parameter in model.named_parameters()
        if ".lora_B." in name and not parameter.any()
    ]


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write what was learned in the layout that stock PEFT reads.

    A prefix is written turned on by P positions, as stock PEFT injects it; with a projection
    the encoder itself is kept beside it, because PEFT's layout has no place for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    match model:
        case PTuningV2Model():
            config = model.peft_config
            prefix = model.prefix().detach().float()
            flat = rotate_keys(model.base, prefix, config.num_virtual_tokens).flatten(1)
            config.inference_mode = True
            config.save_pretrained(str(folder))
            config.inference_mode = False
            save_file(
                {"prompt_embeddings": flat.cpu().contiguous()}, folder / "adapter_model.safetensors"
            )
            if config.prefix_projection:
                save_file(trainable_state(model), folder / PREFIX_FILE)
        case PeftModel():
            # Embeddings are never resized here, and looking for them asks the hub.
            model.save_pretrained(str(folder), save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)
        case _:
            model.save_pretrained(str(folder))  # type: ignore[operator]


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Read into an adapted model what `save_adapter` wrote.

    Raises:
        AdapterError: files are absent, or tensors are missing, unexpected or misshapen.
    """
    weights = folder / "adapter_model.safetensors"
    match model:
        case PTuningV2Model() if (folder / PREFIX_FILE).exists():
            load_trainable_state(model, load_file(folder / PREFIX_FILE), folder / PREFIX_FILE)
        case PTuningV2Model():
            if model.peft_config.prefix_projection:
                raise AdapterError(
                    f"{folder}: no {PREFIX_FILE}, which a prefix with a projection is read from"
                )
            state = _read(weights)
            if set(state) != {"prompt_embeddings"}:
                raise AdapterError(
                    f"{weights}: found {sorted(state)[:3]}, expected "
                    "prompt_embeddings; is it a P-Tuning v2 adapter?"
                )
            flat = state["prompt_embeddings"].float()
            own = model.encoder.embedding.weight
            if flat.shape != own.shape:
                raise AdapterError(
                    f"{weights}: prompt_embeddings has shape {tuple(flat.shape)}, "
                    f"expected {tuple(own.shape)}"
                )
            shape = model.prefix().shape
            turned = rotate_keys(model.base, flat.view(shape).to(own.device), -shape[0])
            own.data.copy_(turned.flatten(1))
        case PeftModel():
            state = {
                name.replace(".weight", ".default.weight") if ".lora_" in name else name: tensor
                for name, tensor in _read(weights).items()
            }
            load_trainable_state(model, state, weights)
        case _:
            load_trainable_state(model, _read(folder / "model.safetensors"), folder)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise AdapterError(
            f"{path}: no such file; an adapter folder holds adapter_config.json "
            "and adapter_model.safetensors"
        )
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own class, which it does not export
        raise AdapterError(f"{path}: cannot be read as safetensors: {error}") from error


def write_fingerprint(folder: Path, fingerprint: dict[str, str]) -> None:
    """Write beside an adapter what it belongs to."""
    (folder / "fingerprint.json").write_text(json.dumps(fingerprint, indent=2) + "\n", "utf-8")


def check_fingerprint(folder: Path, expected: dict[str, str]) -> None:
    """Refuse an adapter that was trained on another base, tokenizer, template or label set."""
    path = folder / "fingerprint.json"
    if not path.exists():
        raise AdapterError(
            f"{path}: no such file; it is written by `llm-emo train`, and without "
            "it nobody knows which base model and prompt the adapter belongs to"
        )
    try:
        found = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path}: cannot be read as a JSON object: {error}") from error
    differing = [key for key in expected if found.get(key) != expected[key]]
    if differing:
        raise AdapterError(
            f"{folder}: trained with another {', '.join(differing)} than this model and prompt "
            "have; load it with the recipe it was trained with"
        )
