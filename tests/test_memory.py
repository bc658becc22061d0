"""What is predicted on the meta device is what a real step takes."""

import gc

import pytest
import tiny
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from llm_emo import attention, decoder_layer, memory, methods, native, recipes
from llm_emo import plan as planning
from llm_emo.models import meta, quantised
from llm_emo.models.chatglm2 import CHATGLM2_6B
from llm_emo.models.ledger import Ledger
from llm_emo.training import answer_loss, collate
from llm_emo.trie import TokenTrie

METHODS = {
    "lora": tiny.lora(),
    "lora with dropout": tiny.lora(dropout=0.2),
    "p_tuning_v2": tiny.p_tuning(),
    "full": recipes.Full(kind="full"),
}
DEPTH = 5
"""Layers of the tiny models here: more than are run when depth is extrapolated."""


def deep(architecture):
    """Return the changes that give a tiny model that many layers."""
    kinds = (["sliding_attention", "full_attention"] * DEPTH)[:DEPTH]
    return {"num_hidden_layers": DEPTH} | (
        {"layer_types": kinds} if architecture == "gemma3" else {}
    )


def batch(rows=6):
    return collate(tiny.encoded(rows))


def drawing(method="lora", architecture="llama", dtype=torch.float32, quantization="none"):
    config = tiny.config(architecture, **deep(architecture))
    return meta.draw(config, METHODS[method], dtype=dtype, quantization=quantization)


def real(method="lora", architecture="llama", dtype=torch.float32):
    model = tiny.model(architecture, **deep(architecture)).to(dtype)
    model.set_attn_implementation(attention.NAME)
    return methods.adapt(model, METHODS[method]).train()


def one_text(nodes):
    """Return a batch of one text that long, with one answer token."""
    only = torch.zeros(1, dtype=torch.long)
    trie = TokenTrie.build([tuple(range(nodes))])
    return {"trie": trie, "nodes": only + nodes - 1, "where": only, "labels": only + 5}


def allocated(model, given):
    """Return what the allocator holds after the forward pass, and at most, of a real step."""
    gc.collect()
    loss = answer_loss(model, given)  # whatever is made once is made now
    loss.backward()
    model.zero_grad()
    del loss
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        loss = answer_loss(model, given)
        with torch.profiler.record_function("between"):
            pass
        loss.backward()
    events = record.profiler.kineto_results.events()
    between = min(e.start_ns() for e in events if e.name() == "between")
    live = peak = saved = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
        if event.start_ns() < between:
            saved = live
    return saved, peak


def test_a_ledger_counts_storages_from_birth_to_death():
    ledger = Ledger("meta", 7)
    with ledger:
        first = torch.empty(100, device="meta")
        view, twice = first.view(10, 10), first * 2
        assert ledger.live == 800
        del first
        assert ledger.live == 800, "the view keeps the storage alive"
        del view
        assert ledger.live == 400
        logits = twice.new_empty(3, 7)
        assert ledger.live_logits == 3 * 7 * 4
        del logits, twice
        assert ledger.live == ledger.live_logits == 0
    assert ledger.peak == 800


@pytest.fixture
def plainly(monkeypatch):
    """Nothing is compiled: it is torch's operations that are predicted."""
    monkeypatch.setattr(native, "library", lambda dtype: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_compiled_loops_keep_no_more_than_torch_s_operations(architecture, dtype, monkeypatch):
    given = batch()
    saved, peak = allocated(real("lora", architecture, dtype), given)
    monkeypatch.setattr(native, "library", lambda dtype: None)
    usually_saved, usual_peak = allocated(real("lora", architecture, dtype), given)
    assert saved <= 1.001 * usually_saved
    assert peak <= 1.001 * usual_peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_prediction_is_what_the_allocator_gives(plainly, method, checkpointing):
    given = batch()
    predicted = memory.training_step(
        drawing(method), given, "cpu", checkpointing=checkpointing, accumulating=False
    )
    model = real(method)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    saved, peak = allocated(model, given)
    # A layer that is to be recomputed keeps the CPU's random state, which a GPU does not hold.
    states = DEPTH * torch.get_rng_state().numel() if checkpointing else 0
    assert predicted.saved + states == pytest.approx(saved, rel=0.05)
    assert predicted.peak < 1.05 * peak  # some of the states may be gone by then
    assert predicted.peak + states > 0.95 * peak


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_prediction_holds_for_every_architecture(plainly, architecture):
    given = batch()
    predicted = memory.training_step(
        drawing("lora", architecture), given, "cpu", checkpointing=False, accumulating=False
    )
    saved, peak = allocated(real("lora", architecture), given)
    assert predicted.saved == pytest.approx(saved, rel=0.05)
    assert predicted.peak == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("scores", [10**6, 0], ids=["plain attention", "fused attention"])
def test_the_prediction_knows_which_attention_a_cpu_takes(plainly, scores, monkeypatch):
    monkeypatch.setattr(attention, "PLAIN_SCORES", scores)
    given = batch(12)
    predicted = memory.training_step(
        drawing(dtype=torch.bfloat16), given, "cpu", checkpointing=False, accumulating=False
    )
    saved, _ = allocated(real(dtype=torch.bfloat16), given)
    assert predicted.saved == pytest.approx(saved, rel=0.05)


def test_on_a_gpu_attention_keeps_the_mask_and_no_scores():
    drawn, rows = drawing(), {}
    for nodes in (160, 320):  # multiples of what rows are padded to
        step = memory.training_step(
            drawn, one_text(nodes), "cuda", checkpointing=False, accumulating=False
        )
        rows[nodes] = step.saved
    # a N + b N^2: beside the boolean mask itself, four bytes of each layer's own
    square = (rows[320] - 2 * rows[160]) / (320**2 - 2 * 160**2)
    assert square == pytest.approx(4 * DEPTH, rel=0.1)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_few_layers_extrapolate_to_all(kind, checkpointing):
    drawn, given = drawing(dtype=torch.bfloat16), batch()
    few, whole = (
        memory.training_step(
            drawn, given, kind, checkpointing=checkpointing, accumulating=False, whole=whole
        )
        for whole in (False, True)
    )
    for name in ("saved", "peak", "logits"):
        assert getattr(few, name) == pytest.approx(getattr(whole, name), rel=1e-3)
    for name in ("tokens", "attention", "head"):
        assert getattr(few.flops, name) == pytest.approx(getattr(whole.flops, name), rel=1e-3)


@pytest.mark.parametrize("score", [True, False], ids=["score", "generate"])
def test_few_layers_extrapolate_to_all_in_evaluation(score):
    drawn = drawing()
    trie = TokenTrie.build([row.prompt for row in tiny.encoded(6)])
    few, whole = (
        memory.scoring_pass(drawn, trie, trie.last, "cpu", whole=whole)
        if score
        else memory.generating_pass(drawn, trie, 4, "cpu", whole=whole)
        for whole in (False, True)
    )
    # At this size the masks of a pass in pieces are a part of the peak that one layer has.
    assert few.peak == pytest.approx(whole.peak, rel=0.01 if score else 0.03)
    assert few.flops.tokens == pytest.approx(whole.flops.tokens, rel=1e-3)
    assert few.flops.head == whole.flops.head > 0


def test_nothing_is_left_behind():
    drawn = drawing("lora with dropout")
    before = drawn.ledger.live
    functions = nn.functional.scaled_dot_product_attention, nn.functional.dropout
    for kind in ("cpu", "cuda"):
        memory.training_step(drawn, batch(), kind, checkpointing=True, accumulating=True)
        with pytest.raises(ZeroDivisionError), meta.standing_for(kind):
            raise ZeroDivisionError
    gc.collect()
    assert drawn.ledger.live == before
    now = nn.functional.scaled_dot_product_attention, nn.functional.dropout
    assert now == functions
    assert attention.sdpa_attention_forward.__module__.startswith("transformers")


def test_operations_are_two_per_weight_and_node_and_pass():
    given = batch()
    nodes, read = len(given["trie"]), len(given["nodes"])
    drawn = drawing("full")
    step = memory.training_step(drawn, given, "cpu", checkpointing=False, accumulating=False)
    weights = _projections(drawn, lambda layer, name: nodes)
    assert step.flops.tokens == 2 * 3 * weights  # forward, gradient of x, gradient of W

    drawn = drawing("lora")
    step = memory.training_step(drawn, given, "cpu", checkpointing=False, accumulating=False)
    attends = ("q_proj", "k_proj", "v_proj")
    # Behind its attention, the last layer written out computes what is read.
    forward = _projections(
        drawn,
        lambda layer, name: read if layer == DEPTH - 1 and name not in attends else nodes,
    )
    # Nobody needs the gradient of frozen embeddings.
    needless = _projections(
        drawn, lambda layer, name: nodes if layer == 0 and name in attends else 0
    )
    own = step.flops.tokens - 2 * (2 * forward - needless)
    assert own == 2 * _adapters(drawn, nodes, read)


def _adapters(drawn, nodes, read):
    """Multiply-adds of LoRA, where the adapters of one input are side by side.

    Of A and of B, each: forward, its own gradient, and that of what it reads.
    """
    total = 0
    for number, layer in enumerate(drawn.base.model.layers):
        for place, group in enumerate(decoder_layer.by_input(layer)):
            adapted = [part for part in group if hasattr(part, "lora_A")]
            rank = sum(part.r["default"] for part in adapted)
            inputs, outputs = group[0].in_features, sum(part.out_features for part in group)
            first, behind = number == place == 0, number == DEPTH - 1 and place > 0
            each = 3 * (inputs + outputs) - first * inputs
            total += rank * each * (read if behind else nodes)
    return total


def _projections(drawn, rows):
    """Multiply-adds of the base's projections, each over `rows(layer, name)` rows."""
    total = 0
    for path, module in drawn.base.named_modules():
        parts = path.removesuffix(".base_layer").split(".")
        if type(module) is nn.Linear and parts[-1].endswith("_proj"):
            total += module.weight.numel() * rows(int(parts[parts.index("layers") + 1]), parts[-1])
    return total


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_bases_are_predicted_too(quantization, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny.model(hidden_size=64, head_dim=16, intermediate_size=128).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        device_map={"": torch.device("cpu")},
        attn_implementation=attention.NAME,
        quantization_config=quantised.config(quantization, torch.bfloat16),
    )
    quantised.settle(model)
    drawn = meta.draw(
        tiny.config("llama", hidden_size=64, head_dim=16, intermediate_size=128),
        METHODS["lora"],
        dtype=torch.bfloat16,
        quantization=quantization,
    )
    kept = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in _all(model)}
    assert drawn.weights == pytest.approx(sum(kept.values()), rel=0.02)
    given = batch()
    predicted = memory.training_step(drawn, given, "cpu", checkpointing=False, accumulating=False)
    saved, peak = allocated(methods.adapt(model, METHODS["lora"]).train(), given)
    assert predicted.saved == pytest.approx(saved, rel=0.15)
    assert predicted.peak == pytest.approx(peak, rel=0.15)


def test_a_weight_that_a_product_writes_out_is_counted():
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 8192}
    peaks = {}
    for quantization in ("none", "nf4"):
        config = tiny.config("llama", **sizes)
        drawn = meta.draw(config, METHODS["lora"], dtype=torch.bfloat16, quantization=quantization)
        trie = TokenTrie.build([(5, 6)])
        peaks[quantization] = memory.scoring_pass(drawn, trie, trie.last, "cuda").peak
    assert peaks["nf4"] - peaks["none"] > 0.9 * 64 * 8192 * 2


def _all(model):
    """Yield what a quantised model holds, also what is no parameter of it."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, quantised.Linear4bit):
            state = module.weight.quant_state
            yield from (state.absmax, state.code, state.offset)
            yield from (state.state2.absmax, state.state2.code)
        elif isinstance(module, quantised.Linear8bitLt):
            held = (module.weight.SCB, module.state.SCB)
            yield from (scale for scale in held if scale is not None)


def test_chatglm2_is_as_large_as_it_is_known_to_be():
    from transformers import AutoConfig

    # GiB of weights; KiB a token and layer, which are more where PEFT's own LoRA runs in float32
    sizes = {"none": (11.63, 138), "nf4": (3.74, 177), "int8": (6.31, 177)}
    for quantization, (gib, kept) in sizes.items():
        drawn = meta.draw(
            AutoConfig.for_model(**CHATGLM2_6B.native_config()),
            tiny.lora(rank=8, target_modules=("q_proj", "k_proj", "v_proj")),
            dtype=torch.bfloat16,
            quantization=quantization,
        )
        assert drawn.parameters == 6_243_584_000
        assert drawn.learning == 3_784_704
        assert drawn.weights / 2**30 == pytest.approx(gib, abs=0.01)
        for checkpointing, kib in ((False, kept), (True, 8)):
            step = memory.training_step(
                drawn, one_text(256), "cuda", checkpointing=checkpointing, accumulating=False
            )
            assert step.saved / 256 / 28 / 2**10 == pytest.approx(kib, rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["lora", "lora with dropout", "p_tuning_v2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_prediction_is_what_a_gpu_gives(method, checkpointing):
    sizes = {"hidden_size": 1024, "head_dim": 128, "num_attention_heads": 8,
             "intermediate_size": 2816, "num_hidden_layers": 6}  # fmt: skip
    config = tiny.config("llama", **sizes)
    drawn = meta.draw(config, METHODS[method], dtype=torch.bfloat16, quantization="none")
    given = one_text(500)
    predicted = memory.training_step(
        drawn, given, "cuda", checkpointing=checkpointing, accumulating=False
    )
    base = tiny.model("llama", **sizes).to("cuda", torch.bfloat16)
    base.set_attn_implementation(attention.NAME)
    model = methods.adapt(base, METHODS[method]).cuda().train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    planning._real_step(model, given, torch.device("cuda"), 0)  # makes what is made once
    model.zero_grad()
    saved, peak = planning._real_step(model, given, torch.device("cuda"), 0)
    assert predicted.saved == pytest.approx(saved, rel=0.15)
    assert predicted.peak == pytest.approx(peak, rel=0.15)
