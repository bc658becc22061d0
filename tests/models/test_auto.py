import json

import pytest
import tiny
import torch

from llm_emo import attention, recipes
from llm_emo.errors import JobFailed, ModelError
from llm_emo.methods import adapt, count_parameters
from llm_emo.models import auto
from llm_emo.training import answer_loss, collate
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


# --- four bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [tiny.lora(), tiny.p_tuning()])
def test_a_four_bit_base_trains_evaluates_and_trains_again(section, tmp_path):
    """On some processors evaluating repacks the weights so that training fails afterwards."""
    folder = saved(tmp_path, hidden_size=64, intermediate_size=128, head_dim=16)
    base = auto.load(spec(folder, quantization="nf4"), section)
    assert base.fingerprint() == auto.load(spec(folder), section).fingerprint()
    whole = count_parameters(auto.load(spec(folder), section).model).total
    assert count_parameters(base.model).total == whole
    model = adapt(base.model, section)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        model.train()
        loss = answer_loss(model, collate(tiny.encoded(4)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            losses.append(float(answer_loss(model, collate(tiny.encoded(4)))))
    assert losses[-1] < losses[0]
    assert verify(model) < 1e-3
