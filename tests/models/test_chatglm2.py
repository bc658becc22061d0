"""ChatGLM2's names, shapes and switches against transformers' GLM and the published facts."""

import dataclasses
import json

import chatglm2_files
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GlmConfig

from llm_emo.errors import ModelError
from llm_emo.models import chatglm2, chatglm2_checks
from llm_emo.models.chatglm2 import CHATGLM2_6B, Layout

SMALL = Layout(
    layers=2, hidden=40, ffn=56, heads=6, groups=3, head_dim=16, vocab=512, positions=256,
    dtype="float32",
)  # fmt: skip


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    size = st.integers(1, 9)
    groups = draw(st.integers(1, 3))
    return Layout(
        layers=draw(st.integers(1, 3)),
        hidden=draw(size),
        ffn=draw(size),
        heads=groups * draw(st.integers(1, 3)),
        groups=groups,
        head_dim=4 * draw(st.integers(1, 3)),
        vocab=draw(size),
        positions=draw(size),
        eps=draw(st.sampled_from([1e-5, 1e-6])),
        dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
    )


def random_tensors(layout: Layout) -> dict[str, torch.Tensor]:
    dtype = getattr(torch, layout.dtype)
    return {name: torch.randn(shape).to(dtype) for name, shape in chatglm2.shapes(layout).items()}


def test_the_published_model_has_the_published_numbers_of_parameters_and_bytes():
    assert CHATGLM2_6B.parameters == 6_243_584_000
    frequencies = chatglm2.inverse_frequencies(CHATGLM2_6B)
    assert frequencies.nbytes == 64
    assert 2 * CHATGLM2_6B.parameters + frequencies.nbytes == 12_487_168_064  # its index says so


def test_the_native_config_is_the_verified_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CHATGLM2_6B.native_config()), "utf-8")
    read = GlmConfig.from_pretrained(tmp_path)
    expected = GlmConfig(
        vocab_size=65024, hidden_size=4096, intermediate_size=13696, num_hidden_layers=28,
        num_attention_heads=32, num_key_value_heads=2, head_dim=128,
        max_position_embeddings=32768, rms_norm_eps=1e-5, attention_bias=True,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        },
    )  # fmt: skip
    assert {**read.to_dict(), "dtype": None, "architectures": None} == {
        **expected.to_dict(), "dtype": None, "architectures": None
    }  # fmt: skip
    assert read.dtype == torch.float16


@settings(deadline=None, max_examples=30)
@given(layout=layouts())
def test_names_and_shapes_are_those_of_transformers_and_of_the_original(layout):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            GlmConfig.from_dict(layout.native_config() | {"vocab_size": max(3, layout.vocab)})
        )
    layout = dataclasses.replace(layout, vocab=max(3, layout.vocab))
    assert chatglm2.native_shapes(layout) == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    sizes = {name: getattr(layout, name) for name in chatglm2_files.SIZES}
    original = chatglm2_files.tensors(**sizes)
    frequencies = original.pop(chatglm2.INV_FREQ)
    assert chatglm2.shapes(layout) == {name: tuple(t.shape) for name, t in original.items()}
    assert torch.equal(
        chatglm2.inverse_frequencies(dataclasses.replace(layout, dtype="float32")), frequencies
    )


@settings(deadline=None, max_examples=30)
@given(layout=layouts())
def test_there_and_back_is_where_it_began(layout, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    assert Layout.from_original(layout.original_config(), folder) == layout
    assert Layout.from_native(layout.native_config(), folder) == layout
    tensors = random_tensors(layout)
    native: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        native |= chatglm2.to_native(name, tensor, layout)
    assert {name: tuple(t.shape) for name, t in native.items()} == chatglm2.native_shapes(layout)
    for name, tensor in tensors.items():
        assert torch.equal(chatglm2.to_original(name, native), tensor)


def test_dividing_queries_keys_and_values_copies_nothing():
    name = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
    tensor = random_tensors(SMALL)[name]
    parts = chatglm2.to_native(name, tensor, SMALL)
    assert [len(part) for part in parts.values()] == [96, 48, 48]
    storages = {part.untyped_storage().data_ptr() for part in parts.values()}
    assert storages == {tensor.untyped_storage().data_ptr()}


def test_an_unknown_name_has_no_native_one():
    for name in ("transformer.encoder.layers.0.mlp.weight", "lm_head.weight"):
        with pytest.raises(KeyError):
            chatglm2.native_names(name)
    assert chatglm2.to_native(chatglm2.INV_FREQ, torch.ones(4), SMALL) == {}


# --- what is refused -----------------------------------------------------------------------------


def refused(folder, changes, *pieces, drop=()):
    config = chatglm2_files.config() | changes
    for key in drop:
        del config[key]
    with pytest.raises(ModelError) as caught:
        Layout.from_original(config, folder)
    for piece in pieces:
        assert piece in str(caught.value)


CHATGLM1 = {
    "bos_token_id": 130004, "eos_token_id": 130005, "gmask_token_id": 130001,
    "inner_hidden_size": 16384, "max_sequence_length": 2048, "position_encoding_2d": True,
    "vocab_size": 130528,
}  # fmt: skip
GLM4 = {
    "eos_token_id": [151329, 151336, 151338], "num_layers": 40, "padded_vocab_size": 151552,
    "rope_ratio": 500, "seq_length": 131072, "num_hidden_layers": 40, "classifier_dropout": None,
}  # fmt: skip
CHATGLM3 = {
    "_name_or_path": "", "hidden_size": 4096, "num_layers": 28, "padded_vocab_size": 65024,
    "seq_length": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        (CHATGLM1, ("ChatGLM-6B, the first generation", "position_encoding_2d")),
        (GLM4, ("GLM-4", "-hf")),
        (GLM4 | {"eos_token_id": 151329}, ("GLM-4",)),
        (GLM4 | {"vision_config": {}}, ("GLM-4V",)),
        ({"model_type": "glm4", "vocab_size": 151552}, ("GLM-4",)),
        (CHATGLM3, ("ChatGLM3", "seq_length 8192", "role tokens")),
        ({"_name_or_path": "THUDM/chatglm3-6b-base"}, ("ChatGLM3", "THUDM/chatglm3-6b-base")),
        ({"model_type": "glm"} | GLM4, ("GLM-4",)),
        ({"model_type": "llama"}, ("no ChatGLM2 checkpoint", "'llama'")),
        ({"model_type": None}, ("no ChatGLM2 checkpoint",)),
    ],
    ids=lambda value: value[0].partition(",")[0] if isinstance(value, tuple) else "",
)
def test_other_models_are_named_as_what_they_are(tmp_path, changes, pieces):
    refused(tmp_path, changes, "chatglm2-6b", *pieces)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenization_chatglm.py"])
def test_a_tokenizer_with_roles_gives_chatglm3_away(tmp_path, name):
    Layout.from_original(chatglm2_files.config(), tmp_path)
    (tmp_path / name).write_text('SPECIALS = ["<|system|>", "<|user|>"]', "utf-8")
    refused(tmp_path, {}, "ChatGLM3", name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("add_bias_linear", True),
        ("add_qkv_bias", False),
        ("apply_residual_connection_post_layernorm", True),
        ("attention_dropout", 0.1),
        ("fp32_residual_connection", True),
        ("hidden_dropout", 0.1),
        ("interleaved_qkv", True),
        ("multi_query_attention", False),
        ("original_rope", False),
        ("post_layer_norm", False),
        ("quantization_embeddings", True),
        ("rmsnorm", False),
        ("rope_ratio", 50),
        ("tie_word_embeddings", True),
        ("eos_token_id", 64793),
        ("pre_seq_len", 128),
        ("quantization_bit", 4),
        ("num_layers", 0),
        ("num_layers", True),
        ("hidden_size", "4096"),
        ("layernorm_epsilon", None),
        ("multi_query_group_num", 4),
        ("kv_channels", 18),
        ("vocab_size", 513),
        ("sliding_window", 4096),
    ],
)
def test_a_setting_that_changes_the_function_is_refused_by_name(tmp_path, key, value):
    refused(tmp_path, {key: value}, key, str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "key", ["add_qkv_bias", "multi_query_attention", "original_rope", "num_layers"]
)
def test_a_key_without_which_the_original_computes_something_else_must_be_there(tmp_path, key):
    refused(tmp_path, {}, key, drop=[key])


def test_a_misspelt_key_is_told_its_nearest_name(tmp_path):
    refused(tmp_path, {"seq_lenght": 10}, "'seq_lenght'", "did you mean 'seq_length'?")


def test_what_a_program_of_the_time_adds_to_a_config_is_harmless(tmp_path):
    added = {
        "classifier_dropout": None, "pre_seq_len": None, "prefix_projection": False,
        "quantization_bit": 0, "vocab_size": 512, "rope_ratio": 1, "bos_token_id": 1,
        "eos_token_id": None, "transformers_version": "4.30.2", "_name_or_path": "/home/me/model",
        "interleaved_qkv": False,
    }  # fmt: skip
    config = chatglm2_files.config() | added
    assert Layout.from_original(config, tmp_path) == SMALL
    assert SMALL.native_config()["eos_token_id"] == 2
    for key in ("rmsnorm", "post_layer_norm", "add_bias_linear"):  # the class has the same default
        del config[key]
    assert Layout.from_original(config, tmp_path) == SMALL


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama"},
        {"eos_token_id": [151329, 151336, 151338]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
        {"attention_bias": False},
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True},
    ],
)
def test_another_glm_model_has_no_form_of_the_original(tmp_path, changes):
    with pytest.raises(ModelError, match=next(iter(changes)).partition("_")[0]):
        Layout.from_native(SMALL.native_config() | changes, tmp_path)


def test_frequencies_are_recognised_in_every_precision_and_no_others():
    exact = chatglm2.inverse_frequencies(dataclasses.replace(CHATGLM2_6B, dtype="float32"))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert chatglm2_checks.same_frequencies(exact.to(dtype), exact)
    # As the original computes them where its config says float16: rounded at every step.
    half = torch.arange(0, 64, 2).half() / 64
    assert chatglm2_checks.same_frequencies(1.0 / (10000**half), exact)
    stretched = 1.0 / (50 * 10000) ** (torch.arange(0, 64, 2) / 64)
    for wrong in (stretched, exact[:-1]):
        assert not chatglm2_checks.same_frequencies(wrong, exact)
