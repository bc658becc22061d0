"""Attention over a prepared mask, with an optional trained prefix.

One implementation for every method, registered with transformers under `NAME`. Over a trie that
is cut in pieces it is `branches.attend`. Otherwise, on a GPU, in float32, and for large passes it
is SDPA; on a CPU in bfloat16 three plain operations (scores, softmax, values) took less than half
the time of SDPA's kernel, measured on a CPU with AVX512-BF16 and no matrix tiles; what they cost
is the memory of the scores, so large passes leave them alone.

Letters: B batch, H heads, G key-value heads, Q queries, K keys, P prefix length, M layers,
D head dimension.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llm_emo.branches import Branches, attend

NAME = "llm_emo"

PLAIN_SCORES = 1024 * 1024
"""Queries times keys up to which the scores are kept: 18 MB a layer with nine heads in bfloat16."""

KEPT_SCORES = 2 * PLAIN_SCORES
"""What a cut trie may cost where scores and copies are kept for a backward pass."""

PASSING_SCORES = 16 * PLAIN_SCORES
"""The same where nothing is kept, and one layer's scores live at a time."""


def attend_by_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefix: Sequence[Tensor] | Mapping[int, Tensor] | None = None,
    branches: Branches | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from (B, H, Q, D) to (B, G, K, D); return (B, Q, H, D).

    `prefix` holds the un-rotated keys and values of each layer, of shape (P, 2, G, D); every
    query sees those of its layer. With `branches` the mask is not looked at.
    """
    both = None
    if prefix is not None:
        both = prefix[int(module.layer_idx)].to(key.dtype)  # type: ignore[arg-type]
    if branches is not None:
        if kwargs.get("dropout") or kwargs.get("softcap") is not None:
            raise RuntimeError("attention over pieces has neither dropout nor a cap on scores")
        return attend(query, key, value, branches, both, kwargs.get("scaling")), None
    if both is not None:
        batch = key.shape[0]
        own_key, own_value = (part.expand(batch, -1, -1, -1) for part in both.permute(1, 2, 0, 3))
        key = torch.cat([own_key, key], dim=2)
        value = torch.cat([own_value, value], dim=2)
        if attention_mask is None:
            raise RuntimeError("the prefix needs an explicit attention mask")
        # A boolean mask says what is visible, a float mask is added: True and 0 both mean "seen".
        seen = float(attention_mask.dtype == torch.bool)
        attention_mask = nn.functional.pad(attention_mask, (both.shape[0], 0), value=seen)
    if (
        attention_mask is not None
        and attention_mask.dtype == torch.bool
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[2] * key.shape[2] <= PLAIN_SCORES
        and not kwargs.get("dropout")
        and kwargs.get("softcap") is None
    ):
        return _plain(query, key, value, attention_mask, kwargs.get("scaling")), None
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )
    return attended


def _plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None
) -> Tensor:
    batch, heads, queries, width = query.shape
    groups = key.shape[1]
    # The heads of a group share its keys, so they are so many more rows of one product.
    rows = (query * (scaling or width**-0.5)).reshape(batch, groups, -1, width)
    scores = (rows @ key.transpose(-1, -2)).view(batch, heads, queries, -1)  # (B, H, Q, K)
    # Not minus infinity: a padding token sees nothing, and its softmax would be no number, which
    # the next layer's values carry to every token.
    unseen = torch.finfo(scores.dtype).min
    scores += torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, unseen)
    shares = scores.softmax(-1).view(batch, groups, -1, key.shape[2])
    return (shares @ value).view(batch, heads, queries, -1).transpose(1, 2)


def _explicit_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    # A causal mask that is left to SDPA's `is_causal` could not be widened by the prefix.
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)  # type: ignore[no-any-return]


AttentionInterface.register(NAME, attend_by_mask)
AttentionMaskInterface.register(NAME, _explicit_mask)
