"""P-Tuning v2: a causal LM with trained keys and values in front of every layer's own.

P-Tuning v2 (Liu et al. 2021, https://arxiv.org/abs/2110.07602) is what PEFT calls prefix tuning:
its parameters live in PEFT's `PrefixEncoder`, but they are attended to *inside* attention instead
of being injected as a cache. The injection moves every token's position by the prefix length,
forbids gradient checkpointing, and breaks with each change of the cache classes; inside attention
the prefix is the un-rotated keys and values that ChatGLM2's own implementation has, tokens start
at position 0, and it composes with the token trie because every node may see it.

Letters: P prefix length, M layers, G key-value heads, D head dimension.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import PrefixEncoder, PrefixTuningConfig
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from llm_emo import attention, recipes
from llm_emo.errors import ModelError


class PTuningV2Model(nn.Module):
    """A frozen causal LM with a trainable prefix of keys and values in every layer.

    `encoder` is PEFT's; its flat output (P, 2*M*G*D) is viewed as (P, 2M, G, D), where index
    2i holds the keys and 2i + 1 the values of layer i, as in the original's `PrefixEncoder`.
    With a projection, an MLP of one hidden layer computes that output from an embedding: of
    width G*D (`layer`, PEFT's form) or of the output's own width (`all`, the original's).
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: PrefixTuningConfig,
        dropout: float,
        projection_input: Literal["layer", "all"] = "layer",
    ) -> None:
        super().__init__()
        base.requires_grad_(False)
        base.set_attn_implementation(attention.NAME)
        if base.config._attn_implementation != attention.NAME:
            raise ModelError(f"{base.config.model_type}: attention cannot be exchanged")
        self.base = base
        self.peft_config = config
        self.encoder = PrefixEncoder(config)
        if config.prefix_projection and projection_input == "all":
            hidden, width = self.encoder.transform[-1].in_features, 2 * config.num_layers
            width *= config.token_dim
            self.encoder.embedding = nn.Embedding(config.num_virtual_tokens, width)
            self.encoder.transform[0] = nn.Linear(width, hidden)
        self.encoder.to(base.device)
        self.dropout = nn.Dropout(dropout)
        self.start = self.prefix().detach().clone()

    @property
    def config(self) -> Any:
        """The base model's config."""
        return self.base.config

    @property
    def prefix_length(self) -> int:
        """P: how many keys and values every node sees in front of the others."""
        return int(self.peft_config.num_virtual_tokens)

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

    def start_from(self, prefix: Tensor) -> None:
        """Let training start from `prefix`, shape (P, 2M, G, D); there must be no projection."""
        self.encoder.embedding.weight.data.copy_(prefix.flatten(1))
        self.start = self.prefix().detach().clone()

    @torch.no_grad()
    def unmoved(self) -> list[str]:
        """Name the layers whose prefix is, bit for bit, what training started from."""
        now = self.prefix()
        start = self.start.to(now)
        return [
            f"prefix of layer {layer}"
            for layer in range(self.peft_config.num_layers)
            if torch.equal(now[:, 2 * layer : 2 * layer + 2], start[:, 2 * layer : 2 * layer + 2])
        ]

    def forward(self, **inputs: Any) -> Any:
        """Run the base model with the prefix in front of every layer's keys and values."""
        prefix = self.dropout(self.prefix()).to(self.base.dtype)
        return self.base(**inputs, prefix=prefix.split(2, 1))  # of each layer, (P, 2, G, D)


def p_tuning_v2(
    base: PreTrainedModel, method: recipes.PTuningV2, prefix_ids: Sequence[int]
) -> PTuningV2Model:
    """Wrap `base` with a prefix as the recipe says.

    Args:
        base: The causal LM.
        method: The recipe's method.
        prefix_ids: With `init: text`, the tokens whose keys and values start the prefix;
            repeated or cut to the prefix length.

    Raises:
        ModelError: attention cannot be exchanged, or a text cannot start the prefix.
    """
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
    model = PTuningV2Model(base, config, method.dropout, method.projection_input)
    if method.init == "text":
        if method.projection:
            raise ModelError(
                "method.init: text starts the prefix itself; with projection: true "
                "the prefix is an output, so take init: random"
            )
        if not prefix_ids:
            raise ModelError("method.init: text needs at least one token of method.init_text")
        ids = [prefix_ids[i % len(prefix_ids)] for i in range(method.prefix_length)]
        model.start_from(_keys_and_values(base, ids))
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
