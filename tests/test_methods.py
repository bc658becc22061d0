import json

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache

from llm_emo import checkpoints, recipes
from llm_emo.errors import AdapterError, ModelError
from llm_emo.methods import (
    PREFIX_FILE,
    PTuningV2Model,
    adapt,
    check_fingerprint,
    count_parameters,
    load_adapter,
    rotate_keys,
    save_adapter,
    untrained,
    write_fingerprint,
)
from llm_emo.training import answer_loss, collate
from llm_emo.trie import TokenTrie, node_logits

architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
methods = pytest.mark.parametrize("method", tiny.METHODS)

SEQUENCE = [3, 50, 200, 7, 8, 9, 10, 11, 12, 60]
SHORT = SEQUENCE[:2]  # with a prefix of four, still inside Gemma-3's window of six
PREFIX_IDS = [90, 91, 92, 93]


def logits(model, sequence=SEQUENCE):
    with torch.no_grad():
        return tiny.alone(model, sequence)


def text_start(architecture, ids=PREFIX_IDS, length=None):
    section = tiny.p_tuning(prefix_length=length or len(ids), init="text", init_text="any")
    return adapt(tiny.model(architecture), section, prefix_ids=ids)


def backward(model, seed=0):
    """Gradients of the summed loss of a few rows in one trie."""
    model.train()
    model.zero_grad()
    answer_loss(model, collate(tiny.encoded(4, seed=seed))).backward()
    return tiny.gradients(model)


# --- what learns -------------------------------------------------------------------------------


@architectures
def test_lora_trains_two_small_matrices_beside_every_named_layer(architecture):
    section = tiny.lora(rank=3, target_modules=("q_proj", "v_proj"))
    model = adapt(tiny.model(architecture), section)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in learning)
    assert all("q_proj" in name or "v_proj" in name for name in learning)
    # rank x (inputs + outputs), in two layers: q is 32 -> 4 heads x 8, v is 32 -> 2 heads x 8
    assert count_parameters(model).trainable == 2 * 3 * ((32 + 32) + (32 + 16))


@architectures
def test_p_tuning_trains_a_key_and_a_value_a_head_a_layer_and_a_position(architecture):
    model = adapt(tiny.model(architecture), tiny.p_tuning(prefix_length=5))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "encoder.embedding.weight"
    ]
    assert count_parameters(model).trainable == 5 * 2 * 2 * 2 * 8  # P, k and v, layers, G, D
    assert model.prefix().shape == (5, 4, 2, 8)


@pytest.mark.parametrize(("reads", "width"), [("layer", 2 * 8), ("all", 2 * 2 * 2 * 8)])
def test_the_projection_trains_its_two_layers(reads, width):
    section = tiny.p_tuning(
        prefix_length=5, projection=True, projection_size=7, projection_input=reads
    )
    model, out = adapt(tiny.model(), section), 2 * 2 * 2 * 8
    assert count_parameters(model).trainable == 5 * width + (width + 1) * 7 + (7 + 1) * out


def test_zero_shot_trains_nothing_and_full_trains_everything():
    frozen = count_parameters(adapt(tiny.model(), recipes.ZeroShot(kind="zero_shot")))
    whole = count_parameters(adapt(tiny.model(), recipes.Full(kind="full")))
    assert (frozen.trainable, whole.trainable) == (0, whole.total)
    assert frozen.total == whole.total


def test_the_count_is_printed_with_its_share():
    text = str(count_parameters(adapt(tiny.model(), tiny.lora())))
    trainable, total = text.split(" parameters")[0].split(" of ")
    share = 100 * int(trainable.replace(",", "")) / int(total.replace(",", ""))
    assert f"{share:.4f} %" in text


@architectures
@methods
def test_every_parameter_that_learns_gets_a_gradient_and_no_other(architecture, method):
    model = tiny.adapted(architecture, method)
    backward(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_an_unknown_target_module_is_refused_with_the_known_ones():
    with pytest.raises(ModelError, match=r"query_key_value.*known:.*q_proj"):
        adapt(tiny.model(), tiny.lora(target_modules=("q_proj", "query_key_value")))


# --- gradients: trie against every sequence alone ----------------------------------------------

rows = st.lists(
    st.tuples(
        st.lists(st.sampled_from([3, 50, 200]), min_size=1, max_size=8).map(tuple),
        st.lists(st.sampled_from([30, 31]), max_size=3).map(lambda ids: (*ids, 2)),
    ),
    min_size=1,
    max_size=5,
)


@architectures
@methods
@given(pairs=rows)
@settings(max_examples=6, deadline=None)
def test_gradients_through_the_trie_are_the_sum_over_sequences_alone(architecture, method, pairs):
    from llm_emo.encoding import Encoded

    model = tiny.adapted(architecture, method)
    encoded = [Encoded(str(i), prompt, answer) for i, (prompt, answer) in enumerate(pairs)]
    answer_loss(model, collate(encoded)).backward()
    together = tiny.gradients(model).clone()
    model.zero_grad()
    for row in encoded:
        scores = tiny.alone(model, [*row.prompt, *row.answer[:-1]])[len(row.prompt) - 1 :]
        nn.functional.cross_entropy(scores, torch.tensor(row.answer), reduction="sum").backward()
    assert tiny.distance(together, tiny.gradients(model)) < 1e-5


@architectures
@methods
@pytest.mark.parametrize("switch", ["before", "after"])
def test_gradient_checkpointing_changes_no_gradient(architecture, method, switch):
    plain = backward(tiny.adapted(architecture, method))
    base = tiny.model(architecture)
    torch.manual_seed(0)
    section = tiny.lora() if method == "lora" else tiny.p_tuning()
    if switch == "before":
        base.activation_checkpointing_enable({"use_reentrant": False})
    model = adapt(base, section)
    if switch == "after":
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.load_state_dict(tiny.adapted(architecture, method).state_dict())
    runs = []
    layer = base.get_decoder().layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    assert tiny.distance(backward(model), plain) < 1e-6
    assert len(runs) == 2, "the layer was not recomputed: checkpointing is off"


@architectures
@methods
def test_accumulated_gradients_are_those_of_one_trie(architecture, method):
    model = tiny.adapted(architecture, method)
    encoded = tiny.encoded(6)
    answer_loss(model, collate(encoded)).backward()
    whole = tiny.gradients(model).clone()
    model.zero_grad()
    for part in (encoded[:1], encoded[1:4], encoded[4:]):
        answer_loss(model, collate(part)).backward()
    assert tiny.distance(tiny.gradients(model), whole) < 1e-5


@architectures
@methods
def test_bfloat16_stays_close_to_float32(architecture, method):
    exact = tiny.adapted(architecture, method)
    rough = tiny.adapted(architecture, method).to(torch.bfloat16)
    trie = TokenTrie.build([SEQUENCE, [3, 50, 7]])
    nodes = torch.arange(len(trie))
    with torch.no_grad():
        expected, got = node_logits(exact, trie, nodes), node_logits(rough, trie, nodes)
    assert got.dtype == torch.bfloat16
    assert tiny.distance(got.float(), expected) < 0.1
    cosine = torch.cosine_similarity(backward(rough).float(), backward(exact), dim=0)
    assert cosine > 0.98


def test_the_prefix_learns_in_float32_over_a_bfloat16_base():
    model = adapt(tiny.model().to(torch.bfloat16), tiny.p_tuning())
    assert model.encoder.embedding.weight.dtype == torch.float32
    assert backward(model).dtype == torch.float32


def test_lora_learns_in_float32_over_a_bfloat16_base():
    # An update of a thousandth of a weight vanishes in bfloat16's eight bits.
    model = adapt(tiny.model().to(torch.bfloat16), tiny.lora())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# --- the prefix --------------------------------------------------------------------------------


@architectures
def test_without_a_prefix_the_wrapped_model_is_the_base(architecture):
    expected = logits(tiny.model(architecture))
    model = adapt(tiny.model(architecture), tiny.p_tuning())
    with torch.no_grad():
        bare = model.base(input_ids=torch.tensor([SEQUENCE])).logits[0]
    assert tiny.distance(bare, expected) < 1e-6


@architectures
def test_every_position_of_the_prefix_is_seen_by_every_token(architecture):
    model = adapt(tiny.model(architecture), tiny.p_tuning())
    before = logits(model)
    for position in range(4):
        changed = adapt(tiny.model(architecture), tiny.p_tuning())
        changed.load_state_dict(model.state_dict())
        with torch.no_grad():
            changed.encoder.embedding.weight[position] += 1
        moved = (logits(changed) - before).norm(dim=-1)
        assert moved.min() > 1e-3


@architectures
def test_a_prefix_from_text_is_that_text_in_front_of_the_sequence(architecture):
    """The first forward pass equals the base model's on text + sequence.

    Rotary attention depends on differences of positions only, so that text at -P..-1 and
    sequence at 0.. is text at 0..P-1 and sequence at P... Gemma-3's sliding layers see the
    whole prefix, but not a whole text: the equality holds as far as its window reaches.
    """
    sequence = SHORT if architecture == "gemma3" else SEQUENCE
    model = text_start(architecture)
    expected = logits(tiny.model(architecture), [*PREFIX_IDS, *sequence])[len(PREFIX_IDS) :]
    assert tiny.distance(logits(model, sequence), expected) < 1e-5


def test_beyond_the_window_a_prefix_is_still_seen_where_text_is_not():
    model = text_start("gemma3")
    expected = logits(tiny.model("gemma3"), [*PREFIX_IDS, *SEQUENCE])[len(PREFIX_IDS) :]
    assert tiny.distance(logits(model), expected) > 1e-3


@architectures
def test_the_init_text_is_repeated_or_cut_to_the_prefix_length(architecture):
    repeated = text_start(architecture, [90, 91, 92], length=5)
    written_out = text_start(architecture, [90, 91, 92, 90, 91])
    torch.testing.assert_close(repeated.prefix(), written_out.prefix())
    cut = text_start(architecture, PREFIX_IDS, length=2)
    torch.testing.assert_close(cut.prefix(), text_start(architecture, PREFIX_IDS[:2]).prefix())


def test_an_init_text_without_tokens_is_refused():
    with pytest.raises(ModelError, match="at least one token"):
        text_start("llama", [], length=3)


@architectures
@given(by=st.integers(1, 40))
@settings(max_examples=5, deadline=None)
def test_turning_keys_on_and_back_gives_the_same_prefix(architecture, by):
    base = tiny.model(architecture)
    prefix = torch.randn(3, 4, 2, 8, generator=torch.Generator().manual_seed(by))
    turned = rotate_keys(base, prefix, by)
    assert torch.equal(turned[:, 1::2], prefix[:, 1::2]), "values have no position"
    assert not torch.allclose(turned[:, ::2], prefix[:, ::2])
    torch.testing.assert_close(turned.norm(dim=-1), prefix.norm(dim=-1))
    torch.testing.assert_close(rotate_keys(base, turned, -by), prefix, atol=1e-5, rtol=1e-5)


@architectures
def test_turning_keys_on_by_n_gives_the_keys_of_the_same_token_n_positions_later(architecture):
    base, by = tiny.model(architecture), 5

    def keys(start):
        cache = DynamicCache()
        with torch.no_grad():
            base(
                input_ids=torch.tensor([[90]]),
                position_ids=torch.tensor([[start]]),
                past_key_values=cache,
                use_cache=True,
            )
        pairs = [part[0] for layer in cache.layers for part in (layer.keys, layer.values)]
        return torch.stack(pairs, dim=1).permute(2, 1, 0, 3)

    torch.testing.assert_close(rotate_keys(base, keys(0), by), keys(by), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate_keys(base, keys(by), -by), keys(0), atol=1e-5, rtol=1e-5)


def test_a_model_without_rotary_positions_is_refused_for_text_prefixes():
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50))
    with pytest.raises(ModelError, match="rotary"):
        rotate_keys(base, torch.zeros(3, 4, 2, 16), 3)


def test_prefix_dropout_acts_in_training_only():
    model = tiny.adapted("llama", "p_tuning_v2", dropout=0.5)
    torch.testing.assert_close(logits(model), logits(model))
    model.train()
    assert not torch.allclose(logits(model), logits(model))


# --- on disk: stock PEFT -----------------------------------------------------------------------


@architectures
def test_stock_peft_reads_a_saved_lora(architecture, tmp_path):
    model = tiny.adapted(architecture, "lora")
    save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(tiny.model(architecture), str(tmp_path)).eval()
    assert (logits(stock) - logits(model)).abs().max() < 1e-5
    assert (logits(stock) - logits(tiny.model(architecture))).abs().max() > 1e-2
    assert not list(tmp_path.glob("*.bin"))
    assert not (tmp_path / "README.md").exists()


@architectures
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"projection": True, "projection_size": 6},
        {"projection": True, "projection_size": 6, "projection_input": "all"},
    ],
)
def test_stock_peft_reads_a_saved_prefix(architecture, changes, tmp_path):
    """Injected as a cache, a prefix sits at 0..P-1 and the tokens behind it.

    In Gemma-3's sliding layers stock PEFT therefore loses the prefix as the tokens move on, as
    it would lose a text; equality holds inside the window.
    """
    sequence = SHORT if architecture == "gemma3" else SEQUENCE
    model = tiny.adapted(architecture, "p_tuning_v2", **changes)
    save_adapter(model, tmp_path)
    base = tiny.model(architecture)
    stock = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert (logits(stock, sequence) - logits(model, sequence)).abs().max() < 3e-4
    assert (logits(model, sequence) - logits(tiny.model(architecture), sequence)).abs().max() > 0.01


@architectures
def test_stock_peft_generates_what_the_prefix_generates_here(architecture, tmp_path):
    from llm_emo.inference import generate

    prompt, limit = SHORT[:1] if architecture == "gemma3" else SEQUENCE, 2
    model = tiny.adapted(architecture, "p_tuning_v2")
    save_adapter(model, tmp_path)
    [(_, here)] = generate(
        model, [tuple(prompt)], ends=frozenset(), max_new_tokens=limit, tokens_per_pass=99
    )
    stock = PeftModel.from_pretrained(tiny.model(architecture), str(tmp_path)).eval()
    tokens = torch.tensor([prompt])
    there = stock.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=limit,
        pad_token_id=0,
    )
    assert there[0, len(prompt) :].tolist() == list(here)


def test_a_prefix_that_stock_peft_trained_is_read_with_its_meaning(tmp_path):
    torch.manual_seed(3)
    stock = get_peft_model(
        tiny.model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    stock.save_pretrained(str(tmp_path))
    model = adapt(tiny.model(), tiny.p_tuning()).eval()
    load_adapter(model, tmp_path)
    assert (logits(stock) - logits(model)).abs().max() < 3e-4


# --- on disk: back into this program -----------------------------------------------------------


@architectures
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {}),
        ("p_tuning_v2", {}),
        ("p_tuning_v2", {"projection": True, "projection_size": 6}),
        ("p_tuning_v2", {"projection": True, "projection_size": 6, "projection_input": "all"}),
    ],
)
def test_what_is_saved_is_what_is_loaded(architecture, method, changes, tmp_path):
    saved = tiny.adapted(architecture, method, **changes)
    save_adapter(saved, tmp_path)
    other = tiny.adapted(architecture, method, seed=9, **changes)
    assert (logits(other) - logits(saved)).abs().max() > 1e-3
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(saved))
    # It goes on learning.
    assert backward(other).abs().max() > 0


def test_a_saved_prefix_can_still_be_trained(tmp_path):
    # Saving writes an adapter for inference; the model at hand must not become one.
    model = tiny.adapted("llama", "p_tuning_v2", projection=True, projection_size=6)
    before = logits(model)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)
    assert model.peft_config.inference_mode is False
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True


def test_full_weights_come_back(tmp_path):
    model = adapt(tiny.model(), recipes.Full(kind="full"))
    save_adapter(model, tmp_path)
    other = adapt(tiny.model(seed=5), recipes.Full(kind="full"))
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


@methods
@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen"])
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_copied(method, damage, tmp_path):
    save_adapter(tiny.adapted("llama", method), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    name = sorted(state)[0]
    match damage:
        case "missing":
            del state[name]
        case "unexpected":
            state["base_model.model.extra.lora_A.weight"] = torch.zeros(2)
        case "misshapen":
            state[name] = torch.zeros(3, 3)
    save_file(state, path)
    model = tiny.adapted("llama", method, seed=9)
    before = logits(model)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_a_prefix_of_another_length_is_refused_with_both_shapes(tmp_path):
    save_adapter(tiny.adapted("llama", "p_tuning_v2", prefix_length=3), tmp_path)
    with pytest.raises(AdapterError, match=r"\(3, 64\).*\(4, 64\)"):
        load_adapter(tiny.adapted("llama", "p_tuning_v2"), tmp_path)


def test_an_adapter_of_the_other_method_is_refused(tmp_path):
    save_adapter(tiny.adapted("llama", "lora"), tmp_path / "lora")
    save_adapter(tiny.adapted("llama", "p_tuning_v2"), tmp_path / "prefix")
    with pytest.raises(AdapterError):
        load_adapter(tiny.adapted("llama", "p_tuning_v2"), tmp_path / "lora")
    with pytest.raises(AdapterError):
        load_adapter(tiny.adapted("llama", "lora"), tmp_path / "prefix")


def test_a_projected_prefix_needs_its_encoder_beside_it(tmp_path):
    changes = {"projection": True, "projection_size": 6}
    save_adapter(tiny.adapted("llama", "p_tuning_v2", **changes), tmp_path)
    (tmp_path / PREFIX_FILE).unlink()
    with pytest.raises(AdapterError, match=PREFIX_FILE):
        load_adapter(tiny.adapted("llama", "p_tuning_v2", **changes), tmp_path)


def test_a_projection_of_another_input_is_refused_with_both_shapes(tmp_path):
    changes = {"projection": True, "projection_size": 6}
    save_adapter(tiny.adapted("llama", "p_tuning_v2", **changes), tmp_path)
    other = tiny.adapted("llama", "p_tuning_v2", **changes, projection_input="all")
    with pytest.raises(AdapterError, match=r"embedding.weight has shape \(4, 16\).*\(4, 64\)"):
        load_adapter(other, tmp_path)


@architectures
def test_a_prefix_as_stock_peft_keeps_it_needs_no_encoder_beside_it(architecture, tmp_path):
    model = tiny.adapted(architecture, "p_tuning_v2")
    save_adapter(model, tmp_path)
    (tmp_path / PREFIX_FILE).unlink()
    other = tiny.adapted(architecture, "p_tuning_v2", seed=9)
    load_adapter(other, tmp_path)
    assert (logits(other) - logits(model)).abs().max() < 1e-4


@pytest.mark.parametrize("changes", [{}, {"projection": True, "projection_size": 6}])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", PREFIX_FILE])
def test_an_exchanged_half_of_a_prefix_is_refused_and_nothing_is_copied(changes, name, tmp_path):
    for seed, folder in enumerate(("a", "b")):
        save_adapter(tiny.adapted("llama", "p_tuning_v2", seed=seed, **changes), tmp_path / folder)
    (tmp_path / "b" / name).rename(tmp_path / "a" / name)
    model = tiny.adapted("llama", "p_tuning_v2", seed=9, **changes)
    before = logits(model)
    with pytest.raises(AdapterError, match="different prefixes"):
        load_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_broken_encoder_file_is_named(content, tmp_path):
    model = tiny.adapted("llama", "p_tuning_v2")
    save_adapter(model, tmp_path)
    (tmp_path / PREFIX_FILE).write_bytes(content)
    with pytest.raises(AdapterError, match=PREFIX_FILE):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
@methods
def test_an_absent_or_broken_adapter_file_is_named(method, content, tmp_path):
    if content is not None:
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        load_adapter(tiny.adapted("llama", method), tmp_path)


# --- fingerprints and untrained layers ---------------------------------------------------------

FINGERPRINT = {"base": "a1", "tokenizer": "b2", "template": "c3", "labels": "d4"}


def test_the_fingerprint_it_was_written_with_is_accepted(tmp_path):
    write_fingerprint(tmp_path, FINGERPRINT)
    check_fingerprint(tmp_path, FINGERPRINT)


@pytest.mark.parametrize("key", sorted(FINGERPRINT))
def test_another_fingerprint_is_refused_by_name(key, tmp_path):
    write_fingerprint(tmp_path, FINGERPRINT)
    with pytest.raises(AdapterError, match=key):
        check_fingerprint(tmp_path, FINGERPRINT | {key: "other"})


def test_an_adapter_without_a_fingerprint_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"fingerprint\.json"):
        check_fingerprint(tmp_path, FINGERPRINT)


@pytest.mark.parametrize("content", ["", "{", "[1]", '"a1"'])
def test_a_damaged_fingerprint_is_named(content, tmp_path):
    (tmp_path / "fingerprint.json").write_text(content)
    with pytest.raises(AdapterError, match=r"fingerprint\.json"):
        check_fingerprint(tmp_path, FINGERPRINT)


def test_untrained_names_the_b_matrices_that_are_still_zero():
    model = adapt(tiny.model(), tiny.lora(target_modules=("q_proj", "v_proj")))
    names = untrained(model)
    assert len(names) == 4
    with torch.no_grad():
        dict(model.named_parameters())[names[0]].add_(1)
    assert untrained(model) == names[1:]
    assert untrained(tiny.adapted("llama", "lora")) == []


@architectures
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init": "text", "init_text": "any"},
        {"projection": True, "projection_size": 6},
        {"projection": True, "projection_size": 6, "projection_input": "all"},
    ],
)
def test_untrained_names_the_layers_whose_prefix_has_not_moved(architecture, changes):
    model = adapt(tiny.model(architecture), tiny.p_tuning(**changes), prefix_ids=PREFIX_IDS)
    assert untrained(model) == ["prefix of layer 0", "prefix of layer 1"]
    backward(model)
    torch.optim.SGD(model.encoder.parameters(), lr=0.1).step()
    assert untrained(model) == []


def test_untrained_sees_a_single_layer_that_no_gradient_reached():
    model = adapt(tiny.model(), tiny.p_tuning())
    with torch.no_grad():
        model.encoder.embedding.weight[:, :32] += 1e-3  # layer 0: (2, G, D) = 32 numbers
    assert untrained(model) == ["prefix of layer 1"]


@architectures
@pytest.mark.parametrize("tie_a", [False, True])
def test_a_moves_as_soon_as_b_has(architecture, tie_a):
    """So an A that stands still is no sign of a layer that does not learn, but its B is."""
    section = tiny.lora(target_modules=recipes.QUERY_KEY_VALUE, tie_a=tie_a)
    model = adapt(tiny.model(architecture), section)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_A." in n}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    moved = []
    for _ in range(2):
        backward(model)
        optimizer.step()
        now = dict(model.named_parameters())
        moved.append([not torch.equal(now[name], tensor) for name, tensor in start.items()])
        assert untrained(model) == []
    assert not any(moved[0])
    assert all(moved[1])


# --- one A for queries, keys and values --------------------------------------------------------

TIED = {"target_modules": recipes.QUERY_KEY_VALUE, "tie_a": True}


def tied(architecture="llama", **changes):
    return tiny.adapted(architecture, "lora", **TIED | changes)


@architectures
def test_a_tied_a_is_counted_once_in_every_block(architecture):
    separate = adapt(tiny.model(architecture), tiny.lora(**TIED | {"tie_a": False}))
    model = adapt(tiny.model(architecture), tiny.lora(**TIED))
    assert count_parameters(separate).trainable == 2 * 2 * (3 * 32 + 32 + 16 + 16)
    assert count_parameters(model).trainable == 2 * 2 * (1 * 32 + 32 + 16 + 16)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum(".lora_A." in name for name in names) == 2
    assert sum(".lora_B." in name for name in names) == 6


@architectures
def test_a_tied_a_gets_the_sum_of_the_three_gradients(architecture):
    """The chain rule: what three separate A of equal values would get, added."""
    model, separate = (
        tied(architecture),
        tiny.adapted(architecture, "lora", **TIED | {"tie_a": False}),
    )
    own = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in separate.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(own[name])
    backward(model)
    backward(separate)
    for name, parameter in separate.named_parameters():
        if ".lora_B." in name:
            torch.testing.assert_close(own[name].grad, parameter.grad)
        if "q_proj.lora_A." in name:
            at = dict(separate.named_parameters())
            total = sum(at[name.replace("q_proj", part)].grad for part in recipes.QUERY_KEY_VALUE)
            torch.testing.assert_close(own[name].grad, total)


@architectures
def test_a_tied_adapter_is_saved_for_stock_peft_and_comes_back_tied(architecture, tmp_path):
    model = tied(architecture)
    save_adapter(model, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(".lora_A." in name for name in state) == 6, "stock PEFT wants one each"
    stock = PeftModel.from_pretrained(tiny.model(architecture), str(tmp_path)).eval()
    assert (logits(stock) - logits(model)).abs().max() < 1e-5
    for tie_a in (True, False):
        other = tiny.adapted(architecture, "lora", seed=9, **TIED | {"tie_a": tie_a})
        assert (logits(other) - logits(model)).abs().max() > 1e-3
        load_adapter(other, tmp_path)
        assert torch.equal(logits(other), logits(model))
        count = count_parameters(
            adapt(tiny.model(architecture), tiny.lora(**TIED | {"tie_a": tie_a}))
        )
        assert count_parameters(other) == count
        assert backward(other).abs().max() > 0


@architectures
def test_a_tied_adapter_merges_as_it_runs(architecture):
    model = tied(architecture)
    before = logits(model)
    assert (logits(model.merge_and_unload()) - before).abs().max() < 1e-4


def test_a_tied_adapter_resumes_from_a_checkpoint_to_the_bit(tmp_path):
    def steps(model, optimizer, schedule, count):
        for seed in range(count):
            model.train()
            answer_loss(model, collate(tiny.encoded(4, seed=seed))).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    def begin(seed):
        model = tied(seed=seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        return model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)

    whole = begin(0)
    steps(*whole, 3)
    checkpoints.save_model(tmp_path, whole[0])
    checkpoints.save_optimizer(tmp_path, *whole[1:])
    steps(*whole, 3)
    resumed = begin(1)
    checkpoints.load_model(tmp_path, resumed[0])
    checkpoints.load_optimizer(tmp_path, *resumed[1:])
    steps(*resumed, 3)
    assert torch.equal(logits(resumed[0]), logits(whole[0]))


@pytest.mark.parametrize("damage", ["differs", "missing"])
def test_an_adapter_with_other_a_s_does_not_load_as_tied(damage, tmp_path):
    save_adapter(tied(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    name = next(name for name in state if "k_proj.lora_A" in name)
    if damage == "differs":
        state[name] = state[name] + 1e-3
    else:
        del state[name]
    save_file(state, path)
    model = tied(seed=9)
    before = logits(model)
    with pytest.raises(AdapterError, match=r"tie_a=false|missing .*k_proj"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_tying_needs_a_block_with_the_three_projections():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.ModuleDict({"qkv": nn.Linear(4, 12)})

    from llm_emo.methods import _tie_a

    model = Fused()
    model.config = tiny.config("llama")
    with pytest.raises(ModelError, match=r"method\.tie_a: llama has no attention block"):
        _tie_a(model)


def test_p_tuning_is_a_wrapper_that_keeps_the_base_untouched():
    base = tiny.model()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapt(base, tiny.p_tuning())
    assert isinstance(model, PTuningV2Model)
    backward(model)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.state_dict().items())
