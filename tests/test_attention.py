"""Attention over a prepared mask: the plain form against SDPA."""

import pytest
import tiny
import torch
from torch import nn

from llm_emo import attention

HEADS, GROUPS, WIDTH = 6, 2, 8


class _Layer(nn.Module):
    layer_idx = 1
    num_key_value_groups = HEADS // GROUPS
    is_causal = True


def _case(queries: int, keys: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, length: int):
        tensor = torch.randn(1, heads, length, WIDTH, generator=generator)
        return tensor.to(dtype).requires_grad_(True)

    mask = torch.rand(1, 1, queries, keys, generator=generator) > 0.4
    mask[..., 0] = True  # every query sees something
    return draw(HEADS, queries), draw(GROUPS, keys), draw(GROUPS, keys), mask


def _reference(query, key, value, mask, scaling):
    key, value = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (key, value))
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7), (3, 9)])
def test_the_plain_form_is_sdpa_with_its_gradients(queries, keys, scaling):
    *inputs, mask = _case(queries, keys, torch.float32)
    plain = attention._plain(*inputs, mask, scaling)
    reference = _reference(*inputs, mask, scaling)
    torch.testing.assert_close(plain, reference)
    weights = torch.randn_like(reference)
    for own, expected in zip(
        torch.autograd.grad((plain * weights).sum(), inputs),
        torch.autograd.grad((reference * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, expected)


def test_bfloat16_on_a_cpu_takes_the_plain_form_and_stays_close(monkeypatch):
    *inputs, mask = _case(5, 5, torch.bfloat16)
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)  # would fail if called
    out, _ = attention.attend_by_mask(_Layer(), *inputs, mask, scaling=0.3, dropout=0.0)
    reference = _reference(*(t.float() for t in inputs), mask, 0.3)
    torch.testing.assert_close(out.float(), reference, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("reason", ["float32", "dropout", "large"])
def test_everything_else_is_left_to_sdpa(reason, monkeypatch):
    dtype = torch.float32 if reason == "float32" else torch.bfloat16
    *inputs, mask = _case(5, 5, dtype)
    monkeypatch.setattr(attention, "_plain", None)  # would fail if called
    if reason == "large":
        monkeypatch.setattr(attention, "PLAIN_SCORES", 24)
    dropout = 0.1 if reason == "dropout" else 0.0
    out, _ = attention.attend_by_mask(_Layer(), *inputs, mask, scaling=0.3, dropout=dropout)
    assert out.shape == (1, 5, HEADS, WIDTH)


def test_every_query_sees_the_prefix_of_its_own_layer():
    query, key, value, mask = _case(4, 4, torch.float32)
    prefix = torch.randn(3, 4, GROUPS, WIDTH)  # (P, 2M, G, D), two layers
    own = prefix.split(2, 1)
    out, _ = attention.attend_by_mask(_Layer(), query, key, value, mask, prefix=own, scaling=0.3)
    longer_key = torch.cat([prefix[:, 2].transpose(0, 1)[None], key], dim=2)
    longer_value = torch.cat([prefix[:, 3].transpose(0, 1)[None], value], dim=2)
    seen = torch.cat([torch.ones(1, 1, 4, 3, dtype=torch.bool), mask], dim=-1)
    torch.testing.assert_close(out, _reference(query, longer_key, longer_value, seen, 0.3))


@pytest.mark.parametrize("prefixed", [False, True])
def test_a_query_that_sees_nothing_spoils_no_other(prefixed):
    """Left padding: the first tokens of a row may attend to nothing at all."""
    *inputs, mask = _case(5, 5, torch.bfloat16)
    mask[..., 0] = False
    mask[..., :2, :] = False
    mask[..., 2:, 4] = True
    prefix = torch.randn(3, 4, GROUPS, WIDTH).split(2, 1) if prefixed else None
    out, _ = attention.attend_by_mask(_Layer(), *inputs, mask, prefix=prefix, scaling=0.3)
    assert out.isfinite().all()
    if not prefixed:
        reference = _reference(*(t.float() for t in inputs), mask, 0.3)
        torch.testing.assert_close(out[:, 2:].float(), reference[:, 2:], atol=0.03, rtol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_left_padded_batch_gives_every_row_its_own_logits(architecture, dtype):
    model = tiny.model(architecture).to(dtype)
    model.set_attn_implementation(attention.NAME)
    row, pads = [3, 50, 200, 7], 3
    ids = torch.tensor([[0] * pads + row, [9, 8, 7, 6, 5, 4, 3]])
    seen = torch.tensor([[0] * pads + [1] * len(row), [1] * 7])
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=seen, position_ids=positions).logits
        alone = tiny.alone(model, row)
    assert padded.isfinite().all()
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert tiny.distance(padded[0, pads:].float(), alone.float()) < bound
