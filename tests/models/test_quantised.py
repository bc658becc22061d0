"""Bases in four and eight bits: what is kept, what is computed, and that training is training."""

import copy
import dataclasses
import json

import program
import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from llm_emo import checkpoints, recipes
from llm_emo.inference import score
from llm_emo.methods import adapt, count_parameters, load_adapter, save_adapter, untrained
from llm_emo.models import auto
from llm_emo.steps import Steps
from llm_emo.training import (
    EmoTrainer,
    EvaluateAndSave,
    answer_loss,
    collate,
    training_arguments,
)
from llm_emo.trie import verify

KINDS = ("nf4", "int8")
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
methods = pytest.mark.parametrize("method", tiny.METHODS)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]
devices = pytest.mark.parametrize("device", DEVICES)

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Rows of whole blocks: NF4 keeps 64 numbers under one scale."""

ROWS = tiny.encoded(6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GLM model, biases and all, as users have it."""
    made = tmp_path_factory.mktemp("base")
    tiny.model("glm", **SIZES).save_pretrained(made)
    tiny.tokenizer().save_pretrained(made)
    return made


@pytest.fixture
def load(folder, monkeypatch):
    """Load the base as the program does, on a device."""

    def made(kind, dtype="float32", device="cpu"):
        if device == "cpu":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        section = recipes.Model(name=str(folder), revision=None, dtype=dtype, quantization=kind)
        return auto.load(section, tiny.lora())

    return made


def adapted(base, method):
    torch.manual_seed(0)
    section = tiny.lora() if method == "lora" else tiny.p_tuning()
    model = adapt(base.model, section)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    return model


def written_out(model):
    """The same weights as the quantised ones stand for, in float32."""
    return copy.deepcopy(model).dequantize(torch.float32).float()


def linears(model):
    return [m for m in model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]


def backward(model):
    model.train()
    model.zero_grad()
    answer_loss(model, collate(ROWS)).backward()
    return tiny.gradients(model)


def all_logits(model, ids):
    model.eval()
    with torch.no_grad():
        return tiny.alone(model, ids).float()


IDS = [3, 50, 200, 7, 8, 9, 10, 11, 12, 60]


# --- what is kept -------------------------------------------------------------------------------


@devices
@dtypes
def test_nf4_is_doubly_quantised_and_computes_in_the_recipe_s_dtype(load, dtype, device):
    layers = linears(load("nf4", dtype, device).model)
    assert len(layers) == 2 * 6, "q, k, v, o, gate_up, down"
    for layer in layers:
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype == getattr(torch, dtype)
        assert not layer.support_avx512bf16_for_cpu, "evaluating would repack the weights"


@devices
@kinds
@methods
def test_only_the_packed_weights_change_their_dtype(load, kind, method, device):
    """Embeddings, head and norms stay in bfloat16: their float32 copies would be 1 GiB at 6B."""
    model = adapted(load(kind, "bfloat16", device), method)
    frozen = {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    packed = {"nf4": torch.uint8, "int8": torch.int8}[kind]
    assert set(frozen.values()) == {packed, torch.bfloat16}
    for name, dtype in frozen.items():
        if any(part in name for part in ("embed_tokens", "lm_head", "norm", "bias")):
            assert dtype == torch.bfloat16, name
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@kinds
def test_packed_weights_count_as_what_they_hold_and_keep_the_base_s_fingerprint(load, kind):
    whole, packed = load("none"), load(kind)
    assert count_parameters(packed.model).total == count_parameters(whole.model).total
    assert packed.fingerprint() == whole.fingerprint()


# --- what is computed ---------------------------------------------------------------------------


@devices
@kinds
@methods
def test_in_float32_a_quantised_base_is_its_own_weights_written_out(load, kind, method, device):
    base = load(kind, device=device)
    plain = adapted(dataclasses.replace(base, model=written_out(base.model)), method)
    packed = adapted(base, method)
    assert tiny.distance(all_logits(packed, IDS), all_logits(plain, IDS)) < 1e-5
    assert tiny.distance(backward(packed), backward(plain)) < 1e-5


@kinds
@methods
def test_bfloat16_costs_a_quantised_base_no_more_than_any_other(load, kind, method):
    """So nothing has to be turned into float32 first, as PEFT's preparation would."""
    distances = {}
    for quantization in ("none", kind):
        base = load(quantization, "bfloat16")
        model = copy.deepcopy(base.model).float() if quantization == "none" else None
        exact = adapted(dataclasses.replace(base, model=model or written_out(base.model)), method)
        rough = adapted(base, method)
        distances[quantization] = (
            tiny.distance(all_logits(rough, IDS), all_logits(exact, IDS)),
            tiny.distance(backward(rough), backward(exact)),
        )
    for own, other in zip(distances[kind], distances["none"], strict=True):
        assert own < 1.5 * other < 0.1


@devices
@kinds
@dtypes
@methods
def test_evaluation_computes_what_training_computes(load, kind, dtype, method, device):
    model = adapted(load(kind, dtype, device), method)
    with torch.no_grad():
        in_training = tiny.alone(model.train(), IDS)
        in_evaluation = tiny.alone(model.eval(), IDS)
    torch.testing.assert_close(in_training, in_evaluation)


@devices
@kinds
def test_a_row_s_score_does_not_depend_on_its_company(load, kind, device):
    """Not even where some activations are large, as they are in models of this size and more."""
    base = load(kind, device=device)
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[:3] *= 20
    rows = [row.prompt for row in ROWS]
    answers = [(30, 2), (31, 33, 2)]
    together = dict(score(base.model, rows, answers, tokens_per_pass=10_000))
    for index, row in enumerate(rows):
        [(_, alone)] = score(base.model, [row], answers, tokens_per_pass=10_000)
        assert together[index] == pytest.approx(alone, abs=1e-4)
    assert verify(base.model) < 1e-5


class Dtypes(TorchDispatchMode):
    """Notes the dtype of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tensor.dtype)
        return out


@devices
@kinds
@dtypes
@methods
def test_nothing_is_computed_in_float16(load, kind, dtype, method, device):
    model = adapted(load(kind, dtype, device), method)
    with Dtypes() as noted:
        backward(model)
        all_logits(model, IDS)
    assert getattr(torch, dtype) in noted.seen
    assert torch.float16 not in noted.seen


@kinds
@methods
def test_no_weight_is_kept_written_out_for_the_gradient(load, kind, method):
    model = adapted(load(kind), method).train()
    shapes = {(layer.out_features, layer.in_features) for layer in linears(model)}
    shapes |= {shape[::-1] for shape in shapes}
    kept = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        answer_loss(model, collate(ROWS)).backward()
    assert any(t.shape[-1] == SIZES["hidden_size"] for t in kept), "activations are kept"
    assert not {tuple(t.shape) for t in kept if t.is_floating_point()} & shapes


# --- training -----------------------------------------------------------------------------------


@devices
@kinds
@dtypes
@methods
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_evaluates_and_trains_again(
    load, kind, dtype, method, checkpointing, device, tmp_path
):
    """On some processors evaluating repacks four-bit weights so that training fails afterwards."""
    model = adapted(load(kind, dtype, device), method)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    frozen = [layer.weight.data.clone() for layer in linears(model)]
    losses = []
    for _ in range(4):
        backward(model)
        optimizer.step()
        all_logits(model, IDS)
        with torch.inference_mode():
            losses.append(float(answer_loss(model.eval(), collate(ROWS))))
    assert losses[-1] < losses[0]
    for before, layer in zip(frozen, linears(model), strict=True):
        assert torch.equal(before, layer.weight.data), "packed weights stay as they were loaded"
    save_adapter(model, tmp_path)
    other = adapted(load(kind, dtype, device), method)
    load_adapter(other, tmp_path)
    torch.testing.assert_close(all_logits(other, IDS), all_logits(model, IDS), atol=1e-4, rtol=1e-4)


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@kinds
@methods
def test_the_training_loop_takes_a_quantised_base_and_resumes_on_it(load, kind, method, tmp_path):
    """Four steps with an evaluation after each; a run that was cut off ends where one was not."""
    section = tiny.train(epochs=2, batch_size=3, micro_batch_size=3, evaluations_per_epoch=2)

    def run(folder, *callbacks, resume=False):
        model = adapted(load(kind), method)
        answers = [row.answer for row in ROWS[:2]]

        def validate(model):
            rows = score(model, [row.prompt for row in ROWS], answers, tokens_per_pass=1000)
            return {"f1": -sum(values[0] for _, values in rows)}

        trainer = EmoTrainer(
            model,
            training_arguments(folder, section, seed=0, metric="f1"),
            rows=ROWS,
            steps=Steps(ROWS, section, seed=0),
            validate=validate,
            callbacks=[EvaluateAndSave(2, 2), *callbacks],
        )
        newest = checkpoints.newest(folder) if resume else None
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        return model, trainer

    whole, trainer = run(tmp_path / "whole")
    assert trainer.state.global_step == 4
    assert untrained(whole) == []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", StopAt())
    resumed, _ = run(tmp_path / "cut", resume=True)
    torch.testing.assert_close(all_logits(resumed, IDS), all_logits(whole, IDS))


@kinds
@pytest.mark.parametrize("recipe", ["mastodon/lora", "mastodon/p_tuning_v2"])
def test_the_program_trains_and_evaluates_on_a_quantised_base(kind, recipe, folder, tmp_path):
    run = program.train(tmp_path / "run", folder, recipe, f"model.quantization={kind}")
    report = json.loads(program.call("evaluate", run, "--json").ok().out)
    assert report["n"] > 0
    # Its adapter belongs to the base, however that is stored.
    unquantised = program.settings("model.quantization=none")
    program.call("predict", run, "-o", tmp_path / "elsewhere", *unquantised).ok()
