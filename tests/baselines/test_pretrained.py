"""What both kinds of encoder share: where they are found, what is said when they are not, a run."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("soundfile")

import test_encoder
import test_speech_encoder_task

from llm_emo.baselines import encoder, fusion, pretrained, speech_encoder_task
from llm_emo.errors import JobFailed, ModelError

KINDS = {"text": encoder.TEXT, "sound": speech_encoder_task.SOUND}
each_kind = pytest.mark.parametrize("kind", KINDS)


def made(folder, kind, **changes):
    """Write a tiny model of a kind; return its folder."""
    folder.mkdir()
    if kind == "text":
        test_encoder.save(folder, **changes)
    else:
        test_speech_encoder_task.encoder(folder)
    return folder


def network(kind):
    """Return what puts a head on a model."""
    if kind == "sound":
        return lambda base: fusion.AudioClassifier(base, 3, 0.0)
    return lambda base: encoder.network(base, test_encoder.SETTINGS, "mean", classes=3)


def without(folder, part):
    """Take a tensor out of a checkpoint; return its name."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    lost = min(name for name in weights if part in name)
    del weights[lost]
    save_file(weights, path, {"format": "pt"})
    return lost


@each_kind
def test_a_folder_needs_no_revision_and_a_hub_s_name_does(kind, tmp_path):
    model, front = pretrained.load(KINDS[kind], str(made(tmp_path / "it", kind)), None)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert hasattr(front, "save_pretrained")
    with pytest.raises(ModelError, match=r"'some/model' is no folder.*a local .*its revision"):
        pretrained.load(KINDS[kind], "some/model", None)


@each_kind
def test_a_hub_that_cannot_be_reached_is_no_fault_of_the_recipe(kind, monkeypatch):
    def offline(*names, **arguments):
        assert arguments["revision"] == "v1"
        assert arguments["trust_remote_code"] is False
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(KINDS[kind].front, "from_pretrained", offline)
    with pytest.raises(JobFailed, match=r"some/model: the Hugging Face hub cannot be reached"):
        pretrained.load(KINDS[kind], "some/model", "v1")


@each_kind
def test_a_checkpoint_that_lacks_what_is_used_is_refused_and_of_the_rest_not(kind, tmp_path):
    whole = made(tmp_path / "whole", kind)
    spare = {"text": "pooler.dense.weight", "sound": "masked_spec_embed"}[kind]
    without(whole, spare)
    pretrained.load(KINDS[kind], str(whole), None)
    lost = without(whole, "encoder.layer")
    what = {"text": "an encoder", "sound": "a speech encoder"}[kind]
    with pytest.raises(ModelError, match=rf"lacks 1 of .*such as {lost}; is it .*, and {what}\?"):
        pretrained.load(KINDS[kind], str(whole), None)


@each_kind
def test_a_pickled_checkpoint_is_not_read(kind, tmp_path):
    folder = made(tmp_path / "it", kind)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot be loaded as an? .*encoder"):
        pretrained.load(KINDS[kind], str(folder), None)


def change(folder, **values):
    """Write other values into a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")
    return folder


@each_kind
def test_a_config_of_wrong_types_is_one_message(kind, tmp_path):
    folder = change(made(tmp_path / "it", kind), hidden_size="16")
    with pytest.raises(ModelError, match=r"it: cannot be loaded as an? .*encoder: .*hidden_size"):
        pretrained.load(KINDS[kind], str(folder), None)


@each_kind
@pytest.mark.parametrize(
    "damage",
    [{"hidden_size": "16"}, {"num_attention_heads": 3}, {"hidden_act": "no such"}],
    ids=str,
)
def test_a_run_with_a_damaged_config_is_named(kind, damage, tmp_path):
    base, front = pretrained.load(KINDS[kind], str(made(tmp_path / "it", kind)), None)
    run = tmp_path / "run"
    run.mkdir()
    pretrained.save(run, network(kind)(base), front)
    with pytest.raises(ModelError, match=f"{run}: its encoder cannot be read"):
        pretrained.read(KINDS[kind], change(run, **damage), network(kind))


@each_kind
@pytest.mark.parametrize("word", ["couldn't connect", "is offline", "read timed out"])
def test_every_way_in_which_a_hub_is_away_counts(kind, word, monkeypatch):
    def away(*names, **arguments):
        raise OSError(f"Somewhere: {word}")

    monkeypatch.setattr(KINDS[kind].front, "from_pretrained", away)
    with pytest.raises(JobFailed, match="name its folder"):
        pretrained.load(KINDS[kind], "some/model", "v1")


def test_memory_that_runs_out_is_no_fault_of_the_files(monkeypatch, tmp_path):
    def full(*names, **arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    folder = made(tmp_path / "it", "text")
    monkeypatch.setattr(encoder.TEXT.front, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        pretrained.load(encoder.TEXT, str(folder), None)


@each_kind
def test_a_run_is_read_back_to_the_bit_and_draws_nobody_s_numbers(kind, tmp_path):
    base, front = pretrained.load(KINDS[kind], str(made(tmp_path / "it", kind)), None)
    one = network(kind)(base)
    run = tmp_path / "run"
    run.mkdir()
    pretrained.save(run, one, front)
    state = torch.get_rng_state()
    two, _ = pretrained.read(KINDS[kind], run, network(kind))
    assert torch.equal(torch.get_rng_state(), state)
    assert not two.training
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {path.suffix for path in run.iterdir()} <= {".json", ".safetensors", ".txt"}


@each_kind
def test_a_run_without_its_files_is_named(kind, tmp_path):
    with pytest.raises(ModelError, match=f"{tmp_path}: its encoder cannot be read"):
        pretrained.read(KINDS[kind], tmp_path, network(kind))
