import json

import chatglm2_files
import pytest
import tiny
import torch

from llm_emo import attention, recipes
from llm_emo.errors import JobFailed, ModelError
from llm_emo.methods import adapt
from llm_emo.models import auto
from llm_emo.trie import verify

LORA, FULL = tiny.lora(), recipes.Full(kind="full")
architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


def spec(name, **changes):
    fields = {"revision": None, "dtype": "float32", "quantization": "none"}
    return recipes.Model(name=str(name), **fields | changes)


def saved(folder, architecture="llama", **changes):
    """A model folder as users have them."""
    tiny.model(architecture, **changes).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


# --- what can be loaded -----------------------------------------------------------------------


@architectures
def test_a_local_folder_gives_the_model_and_tokenizer_in_it(architecture, tmp_path):
    base = auto.load(spec(saved(tmp_path, architecture)), LORA)
    ids = [3, 50, 200, 7]
    with torch.no_grad():
        torch.testing.assert_close(
            tiny.alone(base.model, ids), tiny.alone(tiny.model(architecture), ids)
        )
    assert base.tokenizer("late")["input_ids"] == tiny.tokenizer()("late")["input_ids"]
    assert base.model.config._attn_implementation == attention.NAME
    assert not base.model.training
    assert (base.name, base.revision, base.dtype) == (str(tmp_path), None, "float32")
    assert verify(base.model) < 1e-5


def test_bfloat16_is_loaded_as_asked(tmp_path):
    base = auto.load(spec(saved(tmp_path), dtype="bfloat16"), LORA)
    assert base.dtype == "bfloat16"
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_bfloat16_where_the_machine_has_it_and_never_float16(
    native, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    folder = saved(tmp_path)
    assert auto.load(spec(folder, dtype="auto"), LORA).dtype == (
        "bfloat16" if native else "float32"
    )
    # A full fine-tuning's updates vanish in bfloat16.
    assert auto.load(spec(folder, dtype="auto"), FULL).dtype == "float32"


def test_a_float16_checkpoint_is_not_run_in_float16(tmp_path):
    tiny.model().half().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert auto.load(spec(tmp_path, dtype="auto"), LORA).dtype in {"float32", "bfloat16"}


# --- what is refused --------------------------------------------------------------------------


def test_a_folder_without_a_config_is_refused_with_what_may_be_named(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json.*smollm2-135m"):
        auto.load(spec(tmp_path), LORA)
    with pytest.raises(ModelError, match=r"no folder"):
        auto.load_tokenizer(spec(tmp_path / "absent"))


def test_a_checkpoint_that_brings_its_own_code_is_refused_and_not_run(tmp_path):
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "brings_code",
        "auto_map": {
            "AutoConfig": "code.Config",
            "AutoModelForCausalLM": "code.Model",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="run code"):
        auto.load(spec(folder), LORA)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_architecture_is_refused(tmp_path):
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "never_heard_of"}))
    with pytest.raises(ModelError, match="never_heard_of"):
        auto.load(spec(folder), LORA)


def test_pickled_weights_are_refused(tmp_path):
    folder = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(tiny.model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        auto.load(spec(folder), LORA)


@pytest.mark.parametrize("content", [b"", b"0" * 100])
def test_damaged_weights_are_a_message_not_a_traceback(content, tmp_path):
    folder = saved(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded"):
        auto.load(spec(folder), LORA)


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path)
    state = load_file(folder / "model.safetensors")
    name = next(key for key in state if "q_proj" in key)
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        auto.load(spec(folder), LORA)


def test_weights_of_another_size_are_refused(tmp_path):
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        auto.load(spec(folder), LORA)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        auto.load_tokenizer(spec(tmp_path))


@pytest.mark.parametrize("load", [lambda at: auto.load(at, LORA), auto.load_tokenizer])
def test_a_checkpoint_of_the_original_chatglm2_code_is_sent_to_convert(load, tmp_path):
    folder = chatglm2_files.write_checkpoint(tmp_path / "original")
    with pytest.raises(ModelError, match=f"llm-emo convert {folder} -o FOLDER"):
        load(spec(folder))
    with pytest.raises(ModelError, match="llm-emo convert CHECKPOINT"):
        load(spec(tmp_path / "absent"))


def test_a_hub_that_cannot_be_reached_fails_the_job_and_says_what_to_do(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    there = spec("nobody/no-such-model", revision="0" * 40)
    with pytest.raises(JobFailed, match=r"model\.name=FOLDER"):
        auto.load(there, LORA)
    with pytest.raises(JobFailed, match="nobody/no-such-model"):
        auto.load_tokenizer(there)


# --- fingerprints -----------------------------------------------------------------------------


def test_the_fingerprint_is_the_architecture_s_and_nothing_else_s(tmp_path):
    one = auto.load(spec(saved(tmp_path / "a")), LORA)
    elsewhere = auto.load(spec(saved(tmp_path / "b"), dtype="bfloat16"), LORA)
    other = auto.load(spec(saved(tmp_path / "c", rms_norm_eps=1e-3)), LORA)
    assert one.fingerprint() == elsewhere.fingerprint()
    assert one.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("section", [tiny.lora(), tiny.p_tuning()])
def test_adapting_does_not_change_the_fingerprint(section, tmp_path):
    base = auto.load(spec(saved(tmp_path)), section)
    before = base.fingerprint()
    adapt(base.model, section)
    assert base.fingerprint() == before


def merged(folder, section, size):
    """A copy of the base with a LoRA update merged in, as `export --format merged` writes it."""
    model = adapt(tiny.model(), section)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    model.merge_and_unload().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("module", ["q_proj", "o_proj", "down_proj"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_merged_update_makes_another_base_of_it(module, quantization, tmp_path):
    """An update of a hundredth of the weights' size in one kind of layer, norms untouched."""
    base = auto.load(spec(saved(tmp_path / "a"), quantization=quantization), LORA)
    section = tiny.lora(target_modules=(module,))
    folder = merged(tmp_path / "b", section, size=0.01)
    assert auto.load(spec(folder, quantization=quantization), LORA).weights != base.weights
    untouched = merged(tmp_path / "c", section, size=0.0)
    assert auto.load(spec(untouched, quantization=quantization), LORA).weights == base.weights


@architectures
def test_every_matrix_counts_for_the_fingerprint(architecture, tmp_path):
    base = auto.load(spec(saved(tmp_path / "a", architecture)), LORA)
    model = tiny.model(architecture)
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter += 0.1
        model.save_pretrained(tmp_path / "b")
        files = [tmp_path / "b" / "model.safetensors"]
        assert auto.hash_weights(model, files) != base.weights, name
        with torch.no_grad():
            parameter.copy_(before)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_how_the_weights_are_stored_does_not_change_the_fingerprint(quantization, tmp_path):
    base = auto.load(spec(saved(tmp_path / "one")), LORA)
    tiny.model().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tiny.model().bfloat16().save_pretrained(tmp_path / "half")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("one", "shards", "half"):
        tiny.tokenizer().save_pretrained(tmp_path / name)
        for dtype in ("float32", "bfloat16"):
            section = spec(tmp_path / name, dtype=dtype, quantization=quantization)
            assert auto.load(section, LORA).fingerprint() == base.fingerprint(), (name, dtype)


def test_a_hub_model_has_the_fingerprint_of_its_files(tmp_path, monkeypatch):
    import huggingface_hub

    commit = "0123456789" * 4
    snapshot = tmp_path / "models--somebody--tiny" / "snapshots" / commit
    saved(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    there = spec("somebody/tiny", revision=commit)
    assert auto.weight_files(there, None) == [snapshot / "model.safetensors"]
    here = auto.load(spec(snapshot), LORA)
    assert auto.load(there, LORA).fingerprint() == here.fingerprint()
