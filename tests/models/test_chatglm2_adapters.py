"""Adapters of the original ChatGLM2 code: what they compute must not change on the way."""

import hashlib
import json
import shutil

import chatglm2_files
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GlmConfig

from llm_emo import methods
from llm_emo.errors import AdapterError, ModelError, RunError
from llm_emo.models import adapters, chatglm2, chatglm2_adapters, chatglm2_lora

PEFT_0_4_KEYS = {
    "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "r", "revision", "target_modules", "task_type",
}  # fmt: skip
TARGETS = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj", "gate_up_proj": "mlp.gate_up_proj", "down_proj": "mlp.down_proj",
}  # fmt: skip
SIZES = {"layers": 2, "hidden": 40, "ffn": 56, "heads": 6, "groups": 3, "head_dim": 16}


# --- bases ----------------------------------------------------------------------------------


def native(checkpoint, folder):
    """Write the native form of a checkpoint in one safetensors file; return the folder."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    layout = chatglm2.Layout.from_original(config, checkpoint)
    model = AutoModelForCausalLM.from_config(
        GlmConfig.from_dict(layout.native_config()), dtype=torch.float32
    )
    state = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        state |= chatglm2.to_native(name, tensor, layout)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    return folder


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny checkpoint under the original's names, no two of whose sizes agree."""
    return chatglm2_files.write_checkpoint(
        tmp_path_factory.mktemp("original") / "base", kind="safetensors", **SIZES
    )


@pytest.fixture(scope="module")
def base(original, tmp_path_factory):
    return native(original, tmp_path_factory.mktemp("native") / "base")


@pytest.fixture(scope="module")
def layout(base):
    return chatglm2_adapters.read_layout(base)


@pytest.fixture(scope="module")
def golden(shared_data):
    return shared_data / "chatglm2"


@pytest.fixture(scope="module")
def golden_base(golden, tmp_path_factory):
    return native(golden / "checkpoint", tmp_path_factory.mktemp("golden") / "base")


# --- adapters as foreign programs write them --------------------------------------------------


def lora_config(**changes):
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 8,
        "lora_dropout": 0.1, "bias": "none", "target_modules": ["query_key_value"],
        "modules_to_save": None, "inference_mode": True, "fan_in_fan_out": False,
        "base_model_name_or_path": "THUDM/chatglm2-6b",
    }  # fmt: skip
    return fields | changes


def write_lora(folder, tensors, *, kind="bin", **changes):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(lora_config(**changes)), "utf-8")
    named = {f"base_model.model.{name}.weight": tensor for name, tensor in tensors.items()}
    if kind == "bin":
        torch.save(named, folder / "adapter_model.bin")
    else:
        save_file(named, folder / "adapter_model.safetensors")
    return folder


def fused_tensors(layout, *, rank=2, names=("self_attention.query_key_value",), layers=None):
    """Return random A and B of the original's layers, under its names."""
    generator = torch.Generator().manual_seed(1)
    shapes = chatglm2.shapes(layout)
    made = {}
    for layer in range(layout.layers) if layers is None else layers:
        for name in names:
            path = f"transformer.encoder.layers.{layer}.{name}"
            outputs, inputs = shapes[f"{path.replace(f'.{layer}.', '.0.')}.weight"]
            made[f"{path}.lora_A"] = torch.randn(rank, inputs, generator=generator)
            made[f"{path}.lora_B"] = torch.randn(outputs, rank, generator=generator)
    return made


def write_prefix(folder, layout, *, length=3, projection=False, config=True, **more):
    """Write a checkpoint as the original tuning script does."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(2)
    width = 2 * layout.layers * layout.groups * layout.head_dim
    shapes = {"embedding.weight": (length, width)}
    if projection:
        shapes |= {
            "trans.0.weight": (layout.hidden, width), "trans.0.bias": (layout.hidden,),
            "trans.2.weight": (width, layout.hidden), "trans.2.bias": (width,),
        }  # fmt: skip
    state = {
        f"transformer.prefix_encoder.{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    torch.save(state | more, folder / "pytorch_model.bin")
    if config:
        tuning = {"pre_seq_len": length, "prefix_projection": projection, "quantization_bit": 4}
        values = layout.original_config() | tuning
        (folder / "config.json").write_text(json.dumps(values), "utf-8")
    return state


def read_bin(path):
    return torch.load(path, weights_only=True)


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


# --- LoRA: the golden adapter -----------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_lora(golden, golden_base, tmp_path_factory):
    """The golden fused adapter, converted."""
    out = tmp_path_factory.mktemp("lora") / "native"
    chatglm2_adapters.to_native(golden / "lora_adapter_fused", out, base=golden_base)
    return out


def test_stock_peft_on_the_native_base_gives_the_originals_logits(golden, golden_base, golden_lora):
    cases = load_file(golden / "cases.safetensors")
    expected = load_file(golden / "lora_cases.safetensors")["leftpad.logits"]
    stock = PeftModel.from_pretrained(opened(golden_base), golden_lora).eval()
    with torch.no_grad():
        found = stock(
            input_ids=cases["leftpad.input_ids"],
            attention_mask=cases["leftpad.attention_mask"],
            position_ids=cases["leftpad.position_ids"],
        ).logits
    real = cases["leftpad.attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)
    assert (expected - cases["leftpad.logits"])[real].abs().max() > 0.1, "the adapter does nothing"


def test_merging_the_converted_adapter_gives_the_originals_merged_weights(
    golden, golden_base, golden_lora
):
    merged = PeftModel.from_pretrained(opened(golden_base), golden_lora).merge_and_unload()
    state = merged.state_dict()
    expected = {
        name.removeprefix("merged."): tensor
        for name, tensor in load_file(golden / "lora_cases.safetensors").items()
        if name.startswith("merged.")
    }
    assert len(expected) == 6
    for name, tensor in expected.items():
        torch.testing.assert_close(chatglm2.to_original(name, state), tensor, atol=1e-6, rtol=0)


def test_the_golden_adapter_comes_back_bit_for_bit(golden, golden_base, golden_lora, tmp_path):
    chatglm2_adapters.to_chatglm2(golden_lora, tmp_path / "back", base=golden_base)
    expected = tensors_of(golden / "lora_adapter_fused")
    for found in (tensors_of(tmp_path / "back"), read_bin(tmp_path / "back/adapter_model.bin")):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "back/adapter_config.json").read_text("utf-8"))
    said = json.loads((golden / "lora_adapter_fused/adapter_config.json").read_text("utf-8"))
    assert config == said | {"base_model_name_or_path": None}  # a tiny base is not the published


# --- LoRA: laws -------------------------------------------------------------------------------


def update(pairs, scale):
    """Return what every layer's weight gains."""
    return {name: scale * (up.double() @ down.double()) for name, (down, up) in pairs.items()}


def fused_update(split, layout):
    """Return what the original's weights gain, from what the native ones do."""
    made = {}
    for name, shape in chatglm2.shapes(layout).items():
        if ".layers." not in name or not name.endswith("weight") or len(shape) == 1:
            continue
        parts = [part.removesuffix(".weight") for part in chatglm2.native_names(name)]
        if any(part in split for part in parts):
            rows = chatglm2.split_rows(layout) if len(parts) == 3 else (shape[0],)
            made[name.removesuffix(".weight")] = torch.cat([
                split.get(part, torch.zeros(size, shape[1], dtype=torch.double))
                for part, size in zip(parts, rows, strict=True)
            ])  # fmt: skip
    return made


SMALL = chatglm2.Layout(
    layers=2, hidden=12, ffn=10, heads=3, groups=1, head_dim=8, vocab=16, positions=32
)


@settings(max_examples=60, deadline=None)
@given(
    targets=st.sets(st.sampled_from(sorted(TARGETS)), min_size=1),
    rank=st.integers(1, 3),
    scale=st.sampled_from([0.5, 2.0, 8 / 3]),
    tied=st.booleans(),
    layers=st.sampled_from([None, (0,), (1,), (0, 1)]),
    seed=st.integers(0, 2**16),
)
def test_fusing_keeps_every_update(tmp_path_factory, targets, rank, scale, tied, layers, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = chatglm2.native_shapes(SMALL)
    pairs = {}
    for layer in range(SMALL.layers) if layers is None else layers:
        shared = torch.randn(rank, SMALL.hidden, generator=generator)
        for target in sorted(targets):
            path = f"model.layers.{layer}.{TARGETS[target]}"
            outputs, inputs = shapes[f"{path}.weight"]
            own = torch.randn(rank, inputs, generator=generator)
            down = shared if tied and target in ("q_proj", "k_proj", "v_proj") else own
            pairs[path] = (down, torch.randn(outputs, rank, generator=generator))
    adapter = adapters.Lora(rank, scale, 0.0, layers, pairs, None, {})
    where = tmp_path_factory.getbasetemp()

    fused_rank, fused = chatglm2_lora.fuse(where, adapter, SMALL, "")
    found = update(fused, scale)
    expected = fused_update(update(pairs, scale), SMALL)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-12, rtol=1e-12)
    attention = len(targets & {"q_proj", "k_proj", "v_proj"})
    assert fused_rank == rank * (1 if tied or attention < 2 else attention)
    assert {pair[0].shape[0] for pair in fused.values()} == {fused_rank}

    again = adapters.Lora(fused_rank, scale, 0.0, layers, fused, None, {})
    split = update(chatglm2_lora.split(where, again, SMALL, ""), scale)
    assert fused_update(split, SMALL).keys() == expected.keys()
    for name, gained in fused_update(split, SMALL).items():
        torch.testing.assert_close(gained, expected[name], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], sorted(TARGETS)])
def test_a_stock_adapter_computes_the_same_after_the_way_there_and_back(
    rslora, targets, base, tmp_path
):
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, use_rslora=rslora,
        init_lora_weights=False,
    )  # fmt: skip
    trained = get_peft_model(opened(base), config).eval()
    trained.save_pretrained(tmp_path / "own", save_embedding_layers=False)
    chatglm2_adapters.to_chatglm2(tmp_path / "own", tmp_path / "fused", base=base)
    chatglm2_adapters.to_native(tmp_path / "fused", tmp_path / "back", base=base)
    stock = PeftModel.from_pretrained(opened(base), tmp_path / "back").eval()
    ids = tuple(range(5, 40))
    with torch.no_grad():
        expected, found = tiny.alone(trained, ids), tiny.alone(stock, ids)
        untouched = tiny.alone(opened(base), ids)
    assert (expected - untouched).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-5)


def test_an_adapter_with_rslora_is_written_with_the_alpha_that_old_peft_needs(layout, tmp_path):
    # PEFT 0.4 passes over use_rslora without a word and divides alpha by the rank.
    torch.manual_seed(0)
    pairs = {
        f"model.layers.{layer}.{TARGETS[target]}.lora_{letter}": tensor
        for layer in range(layout.layers)
        for target in ("q_proj", "k_proj", "v_proj")
        for letter, tensor in (
            ("A", torch.ones(4, layout.hidden)),
            ("B", torch.randn(chatglm2.native_shapes(layout)[
                f"model.layers.0.{TARGETS[target]}.weight"][0], 4)),
        )
    }  # fmt: skip
    source = write_lora(
        tmp_path / "own", pairs, kind="safetensors", r=4, lora_alpha=6, use_rslora=True,
        target_modules=["q_proj", "k_proj", "v_proj"],
    )  # fmt: skip
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(layout.native_config()), "utf-8")
    chatglm2_adapters.to_chatglm2(source, tmp_path / "out", base=tmp_path / "base")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text("utf-8"))
    assert set(config) == PEFT_0_4_KEYS
    assert config["lora_alpha"] / config["r"] == pytest.approx(6 / 4**0.5)
    assert config["r"] == 4, "equal A's fuse at their own rank"


def test_a_foreign_adapter_of_other_layers_is_mapped_to_its_native_layers(
    original, layout, tmp_path
):
    names = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h",
             "mlp.dense_4h_to_h")  # fmt: skip
    tensors = fused_tensors(layout, names=names)
    source = write_lora(
        tmp_path / "own", tensors, target_modules=[name.rpartition(".")[2] for name in names]
    )
    told = chatglm2_adapters.to_native(source, tmp_path / "out", base=original)
    assert told["target_modules"] == sorted(TARGETS)
    found, names = tensors_of(tmp_path / "out"), list(TARGETS.values())
    assert len(found) == 2 * len(names) * layout.layers
    dense = found["base_model.model.model.layers.1.mlp.gate_up_proj.lora_B.weight"]
    assert torch.equal(dense, tensors["transformer.encoder.layers.1.mlp.dense_h_to_4h.lora_B"])


def test_some_layers_only_stay_some_layers_only(original, base, layout, tmp_path):
    source = write_lora(
        tmp_path / "own", fused_tensors(layout, layers=[1]), layers_to_transform=[1]
    )
    chatglm2_adapters.to_native(source, tmp_path / "out", base=original)
    stock = PeftModel.from_pretrained(opened(base), tmp_path / "out")
    adapted = {name for name, module in stock.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 3
    assert all(".layers.1." in name for name in adapted)


def test_what_is_read_from_a_pickle_is_said_with_its_hash(original, layout, tmp_path, capsys):
    source = write_lora(tmp_path / "own", fused_tensors(layout))
    told = chatglm2_adapters.to_native(source, tmp_path / "out", base=original)
    expected = hashlib.sha256((source / "adapter_model.bin").read_bytes()).hexdigest()
    assert expected in capsys.readouterr().err
    assert told["read"] == {"adapter_model.bin": expected}
    assert set(told["written"]) == {"adapter_config.json", "adapter_model.safetensors"}


# --- what this program can do with a converted adapter ------------------------------------------


def test_a_converted_lora_is_loaded_by_the_method_that_its_config_states(
    original, base, layout, tmp_path
):
    source = write_lora(tmp_path / "own", fused_tensors(layout), lora_alpha=3)
    chatglm2_adapters.to_native(source, tmp_path / "out", base=original)
    method = adapters.method_of(tmp_path / "out")
    model = methods.adapt(opened(base), method)
    methods.load_adapter(model, tmp_path / "out")
    stock = PeftModel.from_pretrained(opened(base), tmp_path / "out").eval()
    ids = tuple(range(3, 30))
    with torch.no_grad():
        torch.testing.assert_close(tiny.alone(model.eval(), ids), tiny.alone(stock, ids))
    assert method.alpha / method.rank == 1.5


@pytest.mark.parametrize("projection", [False, True])
def test_a_converted_prefix_is_loaded_by_the_method_that_its_config_states(
    projection, original, base, layout, tmp_path
):
    state = write_prefix(tmp_path / "own", layout, projection=projection)
    chatglm2_adapters.to_native(tmp_path / "own", tmp_path / "out", base=base)
    model = methods.adapt(opened(base), adapters.method_of(tmp_path / "out"))
    methods.load_adapter(model, tmp_path / "out")
    found = methods.trainable_state(model)
    name = "encoder.embedding.weight"
    assert torch.equal(found[name], state["transformer.prefix_encoder.embedding.weight"])
    assert len(found) == (5 if projection else 1)


# --- P-Tuning v2: golden ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["prefix", "prefix_projection"])
def golden_prefix(request, golden, golden_base, tmp_path_factory):
    """The golden prefix as the tuning script would have saved it, and converted."""
    cases = load_file(golden / "cases.safetensors")
    start = f"{request.param}.weights."
    state = {n.removeprefix(start): t for n, t in cases.items() if n.startswith(start)}
    folder = tmp_path_factory.mktemp("golden_prefix")
    (folder / "original").mkdir()
    torch.save(state, folder / "original/pytorch_model.bin")
    config = json.loads((golden / "checkpoint/config.json").read_text("utf-8"))
    config["pre_seq_len"] = len(state["transformer.prefix_encoder.embedding.weight"])
    config["prefix_projection"] = request.param == "prefix_projection"
    (folder / "original/config.json").write_text(json.dumps(config), "utf-8")
    chatglm2_adapters.to_native(folder / "original", folder / "native", base=golden_base)
    return request.param, state, folder, cases


def test_stock_peft_reads_the_originals_prefix(golden_prefix, golden_base):
    name, _, folder, cases = golden_prefix
    stock = PeftModel.from_pretrained(opened(golden_base), folder / "native").eval()
    for case in range(5):
        ids, expected = cases[f"nopad.{case}.input_ids"], cases[f"{name}.nopad.{case}.logits"]
        with torch.no_grad():
            found = stock(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(found, expected, atol=3e-4, rtol=0)


def test_this_program_reads_the_originals_prefix(golden_prefix, golden_base):
    name, _, folder, cases = golden_prefix
    model = methods.adapt(opened(golden_base), adapters.method_of(folder / "native"))
    methods.load_adapter(model, folder / "native")
    with torch.no_grad():
        assert torch.equal(model.prefix().flatten(1), cases[f"{name}.flat"])
        found = model.eval()(
            input_ids=cases["leftpad.input_ids"],
            attention_mask=cases["leftpad.attention_mask"],
            position_ids=cases["leftpad.position_ids"],
        ).logits
    real = cases["leftpad.attention_mask"].bool()
    torch.testing.assert_close(
        found[real], cases[f"{name}.leftpad.logits"][real], atol=3e-5, rtol=0
    )


def test_a_golden_prefix_comes_back_bit_for_bit(golden_prefix, golden_base, tmp_path):
    name, state, folder, _ = golden_prefix
    chatglm2_adapters.to_chatglm2(folder / "native", tmp_path / "back", base=golden_base)
    found = read_bin(tmp_path / "back/pytorch_model.bin")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    config = json.loads((tmp_path / "back/config.json").read_text("utf-8"))
    assert config["pre_seq_len"] == len(state["transformer.prefix_encoder.embedding.weight"])
    assert config["prefix_projection"] is (name == "prefix_projection")


# --- P-Tuning v2: laws --------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [False, True])
def test_a_native_prefix_comes_back_bit_for_bit(projection, base, layout, tmp_path):
    write_prefix(tmp_path / "own", layout, projection=projection)
    chatglm2_adapters.to_native(tmp_path / "own", tmp_path / "native", base=base)
    chatglm2_adapters.to_chatglm2(tmp_path / "native", tmp_path / "original", base=base)
    chatglm2_adapters.to_native(tmp_path / "original", tmp_path / "again", base=base)
    names = {path.name for path in (tmp_path / "native").iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    for name in names:
        first, second = (tmp_path / folder / name for folder in ("native", "again"))
        assert first.read_bytes() == second.read_bytes(), name


def test_a_projection_of_pefts_form_is_written_as_the_prefix_that_it_computes(
    base, layout, tmp_path
):
    torch.manual_seed(0)
    model = methods.adapt(
        opened(base), tiny.p_tuning(prefix_length=3, projection=True, projection_size=7)
    )
    methods.save_adapter(model, tmp_path / "own")
    told = chatglm2_adapters.to_chatglm2(tmp_path / "own", tmp_path / "out", base=base)
    assert told["projection"] is False
    state = read_bin(tmp_path / "out/pytorch_model.bin")
    found = state.pop("transformer.prefix_encoder.embedding.weight")
    assert not state
    torch.testing.assert_close(found, model.prefix().detach().flatten(1), atol=1e-5, rtol=1e-5)


def test_a_prefix_that_stock_peft_trained_computes_the_same_in_the_originals_form(
    base, layout, tmp_path
):
    torch.manual_seed(0)
    model = methods.adapt(opened(base), tiny.p_tuning(prefix_length=3)).eval()
    methods.save_adapter(model, tmp_path / "own")
    (tmp_path / "own" / methods.PREFIX_FILE).unlink(missing_ok=True)  # PEFT knows no such file
    chatglm2_adapters.to_chatglm2(tmp_path / "own", tmp_path / "out", base=base)
    state = read_bin(tmp_path / "out/pytorch_model.bin")
    found = state["transformer.prefix_encoder.embedding.weight"]
    torch.testing.assert_close(found, model.prefix().detach().flatten(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_prefix_is_found_in_a_whole_state_dict(sharded, base, layout, tmp_path, capsys):
    own = tmp_path / "own"
    state = write_prefix(own, layout, **{"transformer.output_layer.weight": torch.zeros(3, 2)})
    if sharded:
        (own / "pytorch_model.bin").rename(own / "pytorch_model-00002-of-00002.bin")
        index = {"weight_map": {
            "transformer.encoder.final_layernorm.weight": "pytorch_model-00001-of-00002.bin",
            "transformer.prefix_encoder.embedding.weight": "pytorch_model-00002-of-00002.bin",
        }}  # fmt: skip
        (own / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")
    assert chatglm2_adapters.kind(own) == "p_tuning_v2"
    chatglm2_adapters.to_native(own, tmp_path / "out", base=base)
    assert "1 other tensors are left out" in capsys.readouterr().err
    found = load_file(tmp_path / "out" / methods.PREFIX_FILE)["encoder.embedding.weight"]
    assert torch.equal(found, state["transformer.prefix_encoder.embedding.weight"])


def test_the_tuning_scripts_config_says_the_shape_where_no_base_is_named(layout, tmp_path):
    write_prefix(tmp_path / "own", layout)
    chatglm2_adapters.to_native(tmp_path / "own", tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text("utf-8"))
    assert config["num_layers"] == layout.layers
    assert config["num_attention_heads"] == layout.groups


# --- what is refused ----------------------------------------------------------------------------


def refused(act, *pieces, kind=AdapterError):
    with pytest.raises(kind) as caught:
        act()
    for piece in pieces:
        assert piece in str(caught.value), f"{piece!r} is not in {str(caught.value)!r}"


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"r": 4}, ["lora_A (2, 40)", "r = 4"]),
        ({"r": "8"}, ["r is '8'"]),
        ({"bias": "all"}, ["bias is 'all'"]),
        ({"modules_to_save": ["output_layer"]}, ["modules_to_save", "output_layer"]),
        ({"rank_pattern": {"layers.0": 4}}, ["rank_pattern"]),
        ({"alpha_pattern": {"layers.0": 4}}, ["alpha_pattern"]),
        ({"use_dora": True}, ["use_dora"]),
        ({"fan_in_fan_out": True}, ["fan_in_fan_out"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights", "pissa"]),
        ({"enable_lora": [True, False, True]}, ["enable_lora"]),
        ({"key_of_a_later_peft": 3}, ["key_of_a_later_peft is 3"]),
        ({"peft_type": "IA3"}, ["peft_type is 'IA3'"]),
        ({"peft_type": "P_TUNING"}, ["P_TUNING", "first P-Tuning"]),
        ({"target_modules": ["query_key_value", "dense"]}, ["holds nothing for dense"]),
        ({"target_modules": ["dense"]}, ["holds nothing for dense"]),
        ({"target_modules": None}, ["target_modules is None"]),
        ({"layers_to_transform": [0]}, ["in 2 layers, numbers 0 to 1", "1, 0 to 0"]),
        ({"layers_pattern": "blocks"}, ["layers_pattern"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha is nan"]),
        ({"lora_alpha": True}, ["lora_alpha is True"]),
        ({"r": True}, ["r is True"]),
        ({"lora_dropout": True}, ["lora_dropout is True"]),
        ({"lora_dropout": "0.1"}, ["lora_dropout is '0.1'"]),
        ({"target_modules": "*query"}, ["target_modules is '*query'", "no regular expression"]),
    ],
)
def test_a_config_that_contradicts_the_weights_or_is_not_understood_is_refused(
    changes, pieces, original, layout, tmp_path
):
    source = write_lora(tmp_path / "own", fused_tensors(layout), **changes)
    refused(
        lambda: chatglm2_adapters.to_native(source, tmp_path / "out", base=original),
        str(source), *pieces,
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_an_adapter_of_another_shape_or_depth_is_refused(original, layout, tmp_path):
    tensors = fused_tensors(layout)
    cases = {
        "rows": {n: (t[:-1] if n.endswith("B") else t) for n, t in tensors.items()},
        "columns": {n: (t[:, :-1].clone() if n.endswith("A") else t) for n, t in tensors.items()},
        "deeper": fused_tensors(layout, layers=range(layout.layers + 1)),
        "shallower": fused_tensors(layout, layers=range(layout.layers - 1)),
        "half": dict(list(tensors.items())[:-1]),
        "nan": tensors | {next(iter(tensors)): torch.full((2, layout.hidden), torch.nan)},
    }
    pieces = {
        "rows": "to 191, but the base model's from 40 to 192", "columns": "from 39 to 192",
        "deeper": "in 3 layers, numbers 0 to 2", "shallower": "in 1 layers, numbers 0 to 0",
        "half": "lacks lora_B", "nan": "not finite",
    }  # fmt: skip
    for name, changed in cases.items():
        source = write_lora(tmp_path / name, changed)
        refused(
            lambda at=source: chatglm2_adapters.to_native(at, tmp_path / "out", base=original),
            pieces[name],
        )


def test_an_adapter_of_the_published_model_needs_no_base(tmp_path):
    published = chatglm2.CHATGLM2_6B
    source = write_lora(tmp_path / "own", fused_tensors(published, rank=1), r=1)
    told = chatglm2_adapters.to_native(source, tmp_path / "out")
    assert told["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    chatglm2_adapters.to_chatglm2(tmp_path / "out", tmp_path / "back")
    found, expected = (read_bin(at / "adapter_model.bin") for at in (tmp_path / "back", source))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "back/adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "THUDM/chatglm2-6b"


def test_without_a_base_the_published_shape_is_expected_and_said(layout, tmp_path):
    source = write_lora(tmp_path / "own", fused_tensors(layout))
    refused(
        lambda: chatglm2_adapters.to_native(source, tmp_path / "out"),
        "from 4096 to 4608", "--base FOLDER",
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["transformer.output_layer", "transformer.encoder.layers.0.input_layernorm", "lm_head"],
)
def test_layers_without_a_counterpart_are_refused_by_name(name, original, layout, tmp_path):
    tensors = fused_tensors(layout) | {
        f"{name}.lora_A": torch.zeros(2, layout.hidden), f"{name}.lora_B": torch.zeros(4, 2)
    }  # fmt: skip
    source = write_lora(
        tmp_path / "own", tensors, target_modules=["query_key_value", name.rpartition(".")[2]]
    )
    refused(
        lambda: chatglm2_adapters.to_native(source, tmp_path / "out", base=original),
        name, "no counterpart",
    )  # fmt: skip


@pytest.mark.parametrize("extra", ["modules_to_save", "lora_magnitude_vector", "bias"])
def test_tensors_that_are_no_pair_are_refused_by_name(extra, original, layout, tmp_path):
    tensors = fused_tensors(layout)
    name = f"transformer.encoder.layers.0.self_attention.query_key_value.{extra}"
    source = write_lora(tmp_path / "own", tensors | {name: torch.zeros(3, 3)})
    refused(lambda: chatglm2_adapters.to_native(source, tmp_path / "out", base=original), name)


def test_both_kinds_in_one_folder_are_refused(original, layout, tmp_path):
    source = tmp_path / "own"
    write_lora(source, fused_tensors(layout))
    write_prefix(tmp_path / "other", layout)
    shutil.copy(tmp_path / "other/pytorch_model.bin", source)
    refused(
        lambda: chatglm2_adapters.to_native(source, tmp_path / "out", base=original),
        "two adapters", "pytorch_model.bin",
    )  # fmt: skip


def test_an_empty_state_dict_beside_an_adapter_is_no_second_adapter(original, layout, tmp_path):
    # Training scripts of 2023 wrote one, to keep the base's weights out of their checkpoints.
    source = write_lora(tmp_path / "own", fused_tensors(layout))
    torch.save({}, source / "pytorch_model.bin")
    chatglm2_adapters.to_native(source, tmp_path / "out", base=original)


@pytest.mark.parametrize("to", ["to_native", "to_chatglm2"])
def test_what_is_no_adapter_is_refused(to, original, base, tmp_path):
    convert = getattr(chatglm2_adapters, to)
    refused(lambda: convert(base, tmp_path / "out"), str(base), "no adapter")
    refused(lambda: convert(tmp_path / "absent", tmp_path / "out"), "no such folder")


@pytest.mark.parametrize("projection", [False, True])
def test_what_is_converted_already_is_refused(projection, base, original, layout, tmp_path):
    fused = write_lora(tmp_path / "fused", fused_tensors(layout))
    write_prefix(tmp_path / "prefix", layout, projection=projection)
    for name in ("fused", "prefix"):
        chatglm2_adapters.to_native(tmp_path / name, tmp_path / f"{name}_native", base=base)
        again = "nothing to convert"
        refused(
            lambda at=name: chatglm2_adapters.to_native(
                tmp_path / f"{at}_native", tmp_path / "out", base=base
            ),
            again,
        )
        refused(
            lambda at=name: chatglm2_adapters.to_chatglm2(
                tmp_path / at, tmp_path / "out", base=base
            ),
            again,
        )
    assert fused.exists()


def test_a_folder_that_holds_something_is_left_alone(original, layout, tmp_path):
    source = write_lora(tmp_path / "own", fused_tensors(layout))
    before = sorted(path.name for path in source.iterdir())
    refused(
        lambda: chatglm2_adapters.to_native(source, source, base=original), "is not empty",
        kind=RunError,
    )  # fmt: skip
    assert sorted(path.name for path in source.iterdir()) == before


def test_a_pickle_that_is_no_file_of_tensors_is_refused_with_what_it_is(original, layout, tmp_path):
    source = write_lora(tmp_path / "own", fused_tensors(layout))
    path = source / "adapter_model.bin"
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 29368\n"
    for content, piece in (
        (b"PK\x03\x04 cut short", "truncated or damaged"),
        (pointer.encode(), "git-lfs pointer"),
        (None, "Python objects other than tensors"),
    ):
        if content is None:
            torch.save({"weights": shutil.rmtree}, path)
        else:
            path.write_bytes(content)
        refused(
            lambda: chatglm2_adapters.to_native(source, tmp_path / "out", base=original),
            str(path), piece,
        )  # fmt: skip


def test_a_prefix_that_contradicts_its_config_or_base_is_refused(base, layout, tmp_path):
    def tampered(name, **changes):
        source = tmp_path / name
        write_prefix(source, layout)
        config = json.loads((source / "config.json").read_text("utf-8"))
        (source / "config.json").write_text(json.dumps(config | changes), "utf-8")
        return lambda: chatglm2_adapters.to_native(source, tmp_path / "out", base=base)

    refused(tampered("length", pre_seq_len=4), "pre_seq_len is 4", "3 positions")
    refused(tampered("projection", prefix_projection=True), "prefix_projection is true")
    refused(tampered("layers", num_layers=3), "layers is 3", "has 2")

    write_prefix(tmp_path / "wide", layout)
    state = read_bin(tmp_path / "wide/pytorch_model.bin")
    torch.save({name: tensor[:, :-2] for name, tensor in state.items()},
               tmp_path / "wide/pytorch_model.bin")  # fmt: skip
    refused(
        lambda: chatglm2_adapters.to_native(tmp_path / "wide", tmp_path / "out", base=base),
        "(3, 190)", "(3, 192)",
    )  # fmt: skip
    write_prefix(tmp_path / "odd", layout)
    torch.save(state | {"transformer.prefix_encoder.trans.0.bias": torch.zeros(40)},
               tmp_path / "odd/pytorch_model.bin")  # fmt: skip
    refused(
        lambda: chatglm2_adapters.to_native(tmp_path / "odd", tmp_path / "out", base=base),
        "trans.0.bias", "trans.2.weight",
    )  # fmt: skip


@pytest.mark.parametrize("content", ['{"weight_map": {"%s": "../other.bin"}}', "{}", "{"])
def test_an_index_that_is_damaged_or_leads_elsewhere_is_refused(content, base, layout, tmp_path):
    write_prefix(tmp_path / "own", layout)
    (tmp_path / "own/pytorch_model.bin").rename(tmp_path / "other.bin")
    index = tmp_path / "own" / "pytorch_model.bin.index.json"
    index.write_text(content.replace("%s", "transformer.prefix_encoder.embedding.weight"), "utf-8")
    refused(
        lambda: chatglm2_adapters.to_native(tmp_path / "own", tmp_path / "out", base=base),
        str(index), kind=ModelError,
    )  # fmt: skip


def test_a_native_prefix_of_another_base_is_refused(base, tmp_path):
    model = methods.adapt(tiny.model("glm", num_hidden_layers=3), tiny.p_tuning())
    methods.save_adapter(model, tmp_path / "own")
    refused(
        lambda: chatglm2_adapters.to_chatglm2(tmp_path / "own", tmp_path / "out", base=base),
        "3 layers of 2", "the base has 2",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "piece"),
    [("position_encoding_2d", True, "first generation"), ("seq_length", 8192, "ChatGLM3"),
     ("padded_vocab_size", 151552, "GLM-4")],
)  # fmt: skip
def test_a_prefix_of_another_generation_is_named(key, value, piece, tmp_path):
    write_prefix(tmp_path / "own", chatglm2.CHATGLM2_6B, length=1)
    config = json.loads((tmp_path / "own/config.json").read_text("utf-8"))
    (tmp_path / "own/config.json").write_text(json.dumps(config | {key: value}), "utf-8")
    refused(
        lambda: chatglm2_adapters.to_native(tmp_path / "own", tmp_path / "out"),
        piece, kind=ModelError,
    )  # fmt: skip


@pytest.mark.parametrize("content", ["[]", "{", "1"])
def test_a_base_whose_config_is_no_json_object_is_refused(content, layout, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(content, "utf-8")
    source = write_lora(tmp_path / "own", fused_tensors(layout))
    refused(
        lambda: chatglm2_adapters.to_native(source, tmp_path / "out", base=tmp_path / "base"),
        str(tmp_path / "base/config.json"), kind=ModelError,
    )  # fmt: skip


def test_a_base_that_is_no_chatglm2_is_refused(layout, tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "llama")
    source = write_lora(tmp_path / "own", fused_tensors(layout))
    refused(
        lambda: chatglm2_adapters.to_native(source, tmp_path / "out", base=tmp_path / "llama"),
        str(tmp_path / "llama"), kind=ModelError,
    )  # fmt: skip
