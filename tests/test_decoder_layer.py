"""Decoder layers written out, against the layers' own forward."""

import copy

import pytest
import tiny
import torch

from llm_emo import (
    attention,
    branches,
    decoder_layer,
    native,
    native_attention,
    native_lora,
    training,
)
from llm_emo.decoder_layer import KINDS
from llm_emo.trie import TokenTrie, TrieDecoder, begin, node_logits

ARCHITECTURES = ("llama", "mistral", "qwen2")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def written(monkeypatch):
    """How often a layer was run written out."""
    calls = []
    apply = decoder_layer._Layer.apply

    def counting(*arguments):
        calls.append(1)
        return apply(*arguments)

    monkeypatch.setattr(decoder_layer._Layer, "apply", counting)
    return calls


def ours(architecture, method="lora", dtype=torch.float32, **changes):
    made = tiny.adapted(architecture, method, **changes)
    inner = made.base if method == "p_tuning_v2" else made.get_base_model()
    inner.set_attn_implementation(attention.NAME)
    for parameter in made.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return made


def as_they_were(model):
    """Give the layers back their own forward."""
    for module in model.modules():
        if isinstance(module, KINDS):
            module.__dict__.pop("forward", None)


def learned(model, rows):
    model.zero_grad()
    loss = training.answer_loss(model, training.collate(rows))
    loss.backward()
    return loss.detach(), tiny.gradients(model)


CASES = [
    ("lora", {"target_modules": ALL}),
    ("lora", {"target_modules": ("v_proj",)}),
    ("lora", {"target_modules": ("o_proj", "up_proj")}),
    ("lora", {"target_modules": ("q_proj", "k_proj", "v_proj"), "tie_a": True}),
    ("lora", {"target_modules": ("down_proj", "k_proj"), "rank": 3, "alpha": 5.0}),
    ("p_tuning_v2", {}),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("method", "changes"), CASES)
def test_a_layer_written_out_learns_the_same(architecture, method, changes, written):
    made, rows = ours(architecture, method, **changes), tiny.encoded(9, shared=9)
    loss, gradients = learned(made, rows)
    assert len(written) == 2  # one a layer
    as_they_were(made)
    expected_loss, expected = learned(made, rows)
    assert len(written) == 2
    torch.testing.assert_close(loss, expected_loss)
    assert tiny.distance(gradients, expected) < 1e-5


WIDE = {
    "hidden_size": 64, "intermediate_size": 96, "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
"""Sizes that fill vectors, so that attention and LoRA are compiled loops."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("method", "changes"), CASES)
def test_compiled_loops_learn_the_same(architecture, method, changes, written, monkeypatch):
    if not native.serves(torch.zeros(1)):
        pytest.skip("nothing can be compiled here")
    changes = changes | ({"rank": 8} if method == "lora" else {})
    made, rows = ours(architecture, method, sizes=WIDE, **changes), tiny.encoded(9, shared=9)
    calls = []
    for module, name in ((native_attention, "attend_backward"), (native_lora, "lora_backward")):
        function = getattr(module, name)

        def counting(*arguments, function=function, name=name):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, counting)
    loss, gradients = learned(made, rows)
    assert len(written) == 2
    assert calls.count("attend_backward") == 2
    assert ("lora_backward" in calls) == (method == "lora")
    as_they_were(made)
    monkeypatch.setattr(native, "library", lambda dtype: None)
    expected_loss, expected = learned(made, rows)
    torch.testing.assert_close(loss, expected_loss)
    assert tiny.distance(gradients, expected) < 1e-5


def test_what_is_known_of_layers_is_forgotten_after_a_training(written):
    made, rows = ours("llama"), tiny.encoded(9, shared=9)
    _, expected = learned(made, rows)
    with decoder_layer.unchanged(made):
        for _ in range(2):
            _, found = learned(made, rows)
            assert torch.equal(found, expected)
    with pytest.raises(ZeroDivisionError), decoder_layer.unchanged(made):
        raise ZeroDivisionError
    made.get_base_model().model.layers[0].self_attn.o_proj.base_layer.weight.data.mul_(2)
    _, found = learned(made, rows)
    as_they_were(made)
    _, usual = learned(made, rows)
    assert tiny.distance(found, usual) < 1e-5 < tiny.distance(found, expected)


def test_a_copy_knows_nothing_of_what_it_was_copied_from():
    made, rows = ours("llama"), tiny.encoded(9, shared=9)
    with decoder_layer.unchanged(made):
        _, expected = learned(made, rows)
        copied = copy.deepcopy(made)
    for layer in decoder_layer.written_out(copied):
        layer.mlp.down_proj.weight.data.mul_(2)
    _, found = learned(copied, rows)
    assert tiny.distance(found, expected) > 1e-3


def test_dropout_counts_in_training_only_whatever_was_known_before(written):
    made, rows = ours("llama", dropout=0.3), tiny.encoded(9, shared=9)
    with decoder_layer.unchanged(made):
        learned(made, rows)
        assert len(written) == 2
        made.train()
        learned(made, rows)
        assert len(written) == 2
        made.eval()
        learned(made, rows)
        assert len(written) == 4


@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_layer_that_is_computed_again_in_the_backward_pass_runs_its_own_forward(method, written):
    made, rows = ours("llama", method).train(), tiny.encoded(9, shared=9)
    _, expected = learned(made, rows)
    inner = made.base if method == "p_tuning_v2" else made.get_base_model()
    inner.activation_checkpointing_enable({"use_reentrant": False})
    _, gradients = learned(made, rows)
    assert len(written) == 2  # before
    assert tiny.distance(gradients, expected) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", tiny.METHODS)
def test_layers_written_out_leave_the_same_cache(architecture, method, written):
    made = ours(architecture, method)
    rows = [row.prompt for row in tiny.encoded(9, shared=9)]
    trie = TokenTrie.build([row[4:] for row in rows])

    def decoded():
        beginning = begin(made, rows[0][:4])
        assert beginning is not None
        decoder = TrieDecoder(made, trie, beginning)
        prefilled = decoder.logits
        decoder.step(prefilled.argmax(-1))
        return prefilled, decoder.logits

    with torch.inference_mode():
        found = decoded()
        assert written
        written.clear()
        as_they_were(made)
        expected = decoded()
        assert not written
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [True, False])
def test_in_bfloat16_a_layer_written_out_rounds_no_more_than_its_own_forward(
    written, compiled, monkeypatch
):
    if not compiled:
        monkeypatch.setattr(native, "library", lambda dtype: None)
    rows = tiny.encoded(9, shared=9)
    _, exact = learned(ours("llama"), rows)
    made = ours("llama", dtype=torch.bfloat16)
    written.clear()
    _, found = learned(made, rows)
    assert len(written) == 2
    as_they_were(made)
    _, usual = learned(made, rows)
    assert found.dtype == torch.float32
    assert tiny.distance(found, exact) <= 1.2 * tiny.distance(usual, exact)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_frozen_weights_of_one_input_lie_in_one_storage(dropout):
    made = tiny.adapted("llama", "lora", dropout=dropout)
    plain = tiny.model("llama").state_dict()
    for name, group in (("q_proj", 3), ("gate_proj", 2), ("o_proj", 1)):
        (layer, *_) = (part for path, part in made.named_modules() if path.endswith(name))
        base = getattr(layer, "base_layer", layer)
        whole = base.weight.untyped_storage().nbytes()
        assert whole >= base.weight.nbytes
        assert (whole > base.weight.nbytes) == (group > 1)
    for name, weight in made.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(weight, plain[name.replace(".base_layer", "")]), name


def test_weights_that_were_moved_are_laid_anew(written):
    made, rows = ours("llama"), tiny.encoded(9, shared=9)
    _, expected = learned(made, rows)
    attention_ = made.get_base_model().model.layers[0].self_attn
    bases = [getattr(attention_, f"{name}_proj").base_layer for name in "qkv"]
    for base in bases:
        base.weight.data = base.weight.data.clone()
    bases[1].weight.data.mul_(2)
    _, found = learned(made, rows)
    assert tiny.distance(found, expected) > 1e-3  # what is there now is what is computed
    as_they_were(made)
    _, usual = learned(made, rows)
    assert tiny.distance(found, usual) < 1e-5
    assert len({base.weight.untyped_storage().data_ptr() for base in bases}) == 1


def test_an_adapter_of_another_name_runs_the_layers_own_forward(written):
    made, rows = ours("llama"), tiny.encoded(9, shared=9)
    made.add_adapter("other", made.peft_config["default"])
    made.set_adapter("other")
    made.delete_adapter("default")
    learned(made, rows)
    assert not written


def test_a_layer_that_learns_or_drops_runs_its_own_forward(written):
    trie = TokenTrie.build([row.prompt + row.answer for row in tiny.encoded(9, shared=9)])
    dropping = ours("llama", dropout=0.5).train()
    node_logits(dropping, trie, trie.last)
    assert not written
    dropping.eval()
    node_logits(dropping, trie, trie.last)
    assert len(written) == 2
    dropping.get_base_model().model.layers[0].mlp.up_proj.requires_grad_(True)
    node_logits(dropping, trie, trie.last)
    assert len(written) == 3  # the other layer only


def test_attention_that_drops_is_the_layers_own_by_a_mask_too(monkeypatch, written):
    monkeypatch.setattr(branches, "SHARE", 0.0)
    made = ours("llama")
    trie = TokenTrie.build([row.prompt + row.answer for row in tiny.encoded(9, shared=9)])
    for layer in made.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.5
    with torch.no_grad():
        node_logits(made.train(), trie, trie.last)
        assert not written
        node_logits(made.eval(), trie, trie.last)
    assert len(written) == 2


def test_a_dense_mask_is_the_layers_own(monkeypatch, written):
    monkeypatch.setattr(branches, "SHARE", 0.0)
    made = ours("llama")
    trie = TokenTrie.build([row.prompt + row.answer for row in tiny.encoded(9, shared=9)])
    node_logits(made, trie, trie.last)
    assert not written


def test_the_last_layer_computes_the_states_that_are_read_and_no_others(monkeypatch):
    made = ours("llama")
    trie = TokenTrie.build([row.prompt + row.answer for row in tiny.encoded(9, shared=9)])
    nodes = trie.last[[3, 1, 3, 0]]  # in no order, and one of them twice
    rows = []
    project = decoder_layer.project

    def recorded(x, *arguments, **keywords):
        rows.append(len(x))
        return project(x, *arguments, **keywords)

    monkeypatch.setattr(decoder_layer, "project", recorded)
    found = node_logits(made, trie, nodes)
    # queries, keys and values; the output of attention; gate and up; down
    assert rows == [len(trie)] * 5 + [3] * 3
    as_they_were(made)
    torch.testing.assert_close(found, node_logits(made, trie, nodes))


def test_nobody_computes_the_gradient_of_frozen_embeddings(monkeypatch):
    made, rows = ours("llama"), tiny.encoded(9, shared=9)
    calls = []
    backward = decoder_layer.normed_backward

    def recorded(*arguments):
        calls.append(1)
        return backward(*arguments)

    monkeypatch.setattr(decoder_layer, "normed_backward", recorded)
    learned(made, rows)
    assert len(calls) == 3  # two in the second layer, one in the first
    made.get_input_embeddings().weight.requires_grad_(True)
    learned(made, rows)
    assert len(calls) == 7
    found = made.get_input_embeddings().weight.grad
    as_they_were(made)
    learned(made, rows)
    assert tiny.distance(found, made.get_input_embeddings().weight.grad) < 1e-5


@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_pass_without_targets_leaves_every_gradient_at_zero(method, written):
    made = ours("llama", method)
    trie = TokenTrie.build([row.prompt for row in tiny.encoded(9, shared=9)])
    node_logits(made, trie, torch.empty(0, dtype=torch.long)).sum().backward()
    assert len(written) == 2
    assert not tiny.gradients(made).any()
