"""Copies of frozen weights that products read: the same results, and never those of another."""

import copy
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from llm_emo import attention, decoder_layer, machine, packed
from llm_emo.packed import Packed
from llm_emo.training import answer_loss, collate
from llm_emo.trie import TokenTrie, node_logits


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def dtype(request):
    if not packed.available(request.param):
        pytest.skip(f"this machine has no such products in {request.param}")
    return request.param


@pytest.fixture
def forbidden(monkeypatch):
    """Nobody wants copies."""
    monkeypatch.setenv("LLM_EMO_PACKED", "0")
    packed.available.cache_clear()
    yield
    packed.available.cache_clear()


def drawn(rows, inputs, outputs, dtype):
    torch.manual_seed(0)
    return (torch.randn(size).to(dtype) for size in ((rows, inputs), (outputs, inputs), (outputs,)))


def same(found, exact, dtype):
    if dtype == torch.bfloat16:
        assert torch.equal(found, exact)
    else:
        assert (found - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_products_are_torch_s(rows, dtype):
    x, weight, bias = drawn(rows, 96, 40, dtype)
    kept = Packed().of(weight)
    linear = nn.functional.linear
    same(kept.product(x, weight, bias), linear(x, weight, bias), dtype)
    same(kept.product(x, weight, None), linear(x, weight), dtype)
    same(kept.back(bias.expand(rows, -1), weight), bias.expand(rows, -1) @ weight, dtype)
    wide = torch.cat([x, x], 1)[:, 48:144]  # rows that stand apart
    same(kept.product(wide, weight, None), linear(wide, weight), dtype)


def test_a_copy_is_made_once_and_only_where_it_is_needed(dtype, monkeypatch):
    made = []
    laid_out = packed._laid_out
    monkeypatch.setattr(packed, "_laid_out", lambda weight: made.append(1) or laid_out(weight))
    x, weight, _ = drawn(3, 32, 32, dtype)
    kept = Packed()
    for count in (1, 1, 1):
        kept.of(weight).product(x, weight, None)
        assert len(made) == count
    for count in (2, 2):
        kept.of(weight).back(x, weight)
        assert len(made) == count


def test_a_weight_that_was_written_into_is_laid_out_anew(dtype):
    x, weight, _ = drawn(3, 32, 32, dtype)
    kept = Packed()
    for _ in range(2):
        kept.of(weight).product(x, weight, None)
        kept.of(weight).back(x, weight)
        weight.data += torch.randn(32, 1).to(dtype) @ torch.randn(1, 32).to(dtype)  # as PEFT does
        same(kept.of(weight).product(x, weight, None), x @ weight.T, dtype)
        same(kept.of(weight).back(x, weight), x @ weight, dtype)


def test_a_weight_that_was_exchanged_is_laid_out_anew(dtype):
    x, weight, _ = drawn(3, 32, 32, dtype)
    kept = Packed()
    kept.of(weight).product(x, weight, None)
    other = weight.clone()
    other.view(-1)[1] += 1  # not one of those that are looked at
    same(kept.of(other).product(x, other, None), x @ other.T, dtype)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda kept: pickle.loads(pickle.dumps(kept))])
def test_what_is_copied_or_pickled_begins_anew(through, dtype):
    x, weight, _ = drawn(3, 32, 32, dtype)
    kept = Packed()
    kept.of(weight).product(x, weight, None)
    again = through(kept)
    assert vars(again) == vars(Packed())
    same(again.of(weight).product(x, weight, None), x @ weight.T, dtype)


@pytest.mark.parametrize(
    "where", [np.s_[:1536], np.s_[1536:2048], np.s_[:, 1:], np.s_[:, :64], np.s_[::7]]
)
def test_a_change_of_a_part_is_seen(where, dtype):
    x, weight, _ = drawn(3, 576, 3072, dtype)
    kept = Packed()
    kept.of(weight).product(x, weight, None)
    weight.data[where] *= 1.5
    same(kept.of(weight).product(x, weight, None), x @ weight.T, dtype)


def test_no_copy_is_kept_of_what_products_cannot_read(dtype):
    weight = torch.ones(32, 32, dtype=dtype)
    kept = Packed()
    for other in (weight.T[:16], weight.double(), weight.to("meta")):
        assert kept.of(weight) is kept
        kept.product(weight, weight, None)
        kept.back(weight, weight)
        assert kept.of(other) is None
        assert (kept._forward, kept._backward) == (None, None)


def test_whoever_wants_none_has_none(dtype, forbidden):
    assert Packed().of(torch.ones(32, 32, dtype=dtype)) is None


def test_copies_take_an_eighth_of_the_memory_at_most(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: 1600)
    assert packed.worthwhile(100)
    assert not packed.worthwhile(101)
    monkeypatch.setattr(machine, "processes", lambda: SimpleNamespace(num_processes=2))
    assert packed.worthwhile(50)
    assert not packed.worthwhile(51)
    monkeypatch.setattr(machine, "memory", lambda: None)
    assert not packed.worthwhile(1)


def test_this_machine_says_how_much_memory_it_has():
    assert 2**28 < machine.memory() < 2**50


# --- in a model ---------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch):
    """How many products were by a copy."""
    counts = Counter()
    multiplied = packed._multiplied

    def counted(*args):
        counts["all"] += 1
        return multiplied(*args)

    monkeypatch.setattr(packed, "_multiplied", counted)
    return counts


def adapted(method, dtype):
    model = tiny.adapted("llama", method).to(dtype)
    (model.base if method == "p_tuning_v2" else model.base_model.model).set_attn_implementation(
        attention.NAME
    )
    return model


def gradients(model, rows):
    """Return the loss, and the gradients of what learns."""
    model.zero_grad()
    loss = answer_loss(model, collate(rows))
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_step_with_copies_is_the_step_without(method, dtype, products, monkeypatch):
    rows = tiny.encoded(9, shared=9)
    found = []
    for kept in (True, False):
        monkeypatch.setattr(decoder_layer, "worthwhile", lambda size, kept=kept: kept)
        model = adapted(method, dtype)
        assert (decoder_layer.packed_bytes(model) > 0) == kept
        products.clear()
        found.append(gradients(model, rows))
        assert (products["all"] > 0) == kept
    assert len(found[0]) == len(found[1]) > 1
    for own, other in zip(*found, strict=True):
        same(own, other, dtype)


def test_a_model_reads_a_merged_adapter(dtype, products):
    model = adapted("lora", dtype).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    trie = TokenTrie.build([row.prompt + row.answer for row in tiny.encoded(9, shared=9)])
    found = []
    with torch.inference_mode():
        with model.disable_adapter():
            bare = node_logits(model, trie, trie.last).float()
        for read in (model, model.merge_and_unload()):
            products.clear()
            found.append(node_logits(read, trie, trie.last).float())
            assert products["all"] > 0
    adapted_, merged = found
    assert (merged - adapted_).norm() < 0.1 * (merged - bare).norm()


def test_what_was_scored_first_can_learn(dtype, products):
    model, rows = adapted("lora", dtype), tiny.encoded(9, shared=9)
    trie = TokenTrie.build([row.prompt for row in rows])
    with torch.inference_mode():
        node_logits(model, trie, trie.last)
    assert products["all"] > 0
    assert len(gradients(model, rows)) > 2
