"""Memory, tokens, steps and time of a recipe, before anything runs."""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from llm_emo import memory, methods, recipes
from llm_emo.encoding import Encoder
from llm_emo.errors import RecipeError
from llm_emo.experiment import Experiment
from llm_emo.models import auto, meta
from llm_emo.models.ledger import Ledger
from llm_emo.planner import FASTER, GIB, Choice, Place, Planner
from llm_emo.training import answer_loss, collate

CHECKPOINTS = 3
"""On disk at once: the newest, the best, and the one that is being written."""

PRODUCTS = 0.65
"""Share of a step's time that its matrix products take; the rest moves memory only.

Measured on one CPU core: 0.5 to 0.7 in bfloat16 (mastodon/lora, vader/p_tuning_v2), 0.7 to 0.9 in
float32 (sst5/lora).
"""

RATE_SECONDS = 0.4
"""How long each shape of product is measured."""

KERNELS = {
    "cuda": "memory-efficient attention (any mask), which keeps no scores",
    "cpu": "this program's attention in pieces or, in bfloat16, over the whole pass, which keep "
    "their scores; for large passes torch's fused attention, which keeps none",
}


def plan(
    experiment: Experiment,
    *,
    gpu_memory: int | None = None,
    measure: bool = False,
    texts: int | None = None,
) -> dict[str, Any]:
    """Return what a recipe's run needs, and the fastest way to run it that fits.

    Args:
        experiment: The recipe with its corpus.
        gpu_memory: Bytes of a GPU elsewhere; without it, the plan is for this machine.
        measure: Also run one small training step here, and compare with what is predicted for it.
        texts: Also say what labelling so many texts takes, like those that are evaluated.

    Returns:
        What `llm-emo plan --json` prints; sizes in bytes. `verdict` is one line that says what
        to do.

    Raises:
        ModelError: there is no such model, or the method does not fit it.
        RunError: this machine does not say how much memory it has.
    """
    place = Place.of(gpu_memory)
    planner = Planner(experiment, place)
    own, choices = planner.own, planner.choices
    best = planner.fastest(choices)
    # A saving too small to notice is no reason to change a recipe.
    if best is not None and planner.fits(own):
        gained = planner.relative(best) < FASTER * planner.relative(own)
        best = best if gained else own
    by_tokens = None if best is None else planner.by_tokens(best)
    recipe = experiment.recipe
    result: dict[str, Any] = {
        "model": recipe.model.name,
        "parameters": planner.drawing("none").parameters,
        "method": recipe.method.kind,
        "trainable_parameters": planner.drawing(own.quantization).learning,
        "dtype": str(planner.dtype).removeprefix("torch."),
        "place": place.name,
        "device": place.kind,
        "capacity": place.capacity,
        "attention": KERNELS[place.kind],
        "notes": planner.work.notes,
        "training": _training(planner),
        "evaluation": _evaluation(planner),
        "memory": _memory(planner, own),
        "operations": own.operations,
        "seconds": _seconds(planner, own) if place.here else None,
        "disk": _disk(planner),
        "choices": [_row(planner, choice, best) for choice in choices],
        "suggestion": None if best is None else _row(planner, best, best),
        "by_tokens": None if by_tokens is None else _row(planner, by_tokens, best),
    }
    if measure:
        result["measured"] = measured(experiment)
    if texts is not None:
        result["labelling"] = _labelling(planner, result["seconds"], texts)
    return result | {"verdict": _verdict(planner, own, best)}


def _training(planner: Planner) -> dict[str, Any] | None:
    train, work = planner.recipe.train, planner.work
    if train is None:
        return None
    drawn = planner.batches(train.micro_batch_size, train.tokens_per_pass)
    run = int(drawn.nodes.sum())
    return {
        "rows": len(work.train),
        "shortened": sum(row.dropped > 0 for row in work.train),
        "longest": max(len(row.prompt) + len(row.answer) for row in work.train),
        "epochs": train.epochs,
        "steps": work.steps,
        "batch_size": train.batch_size,
        "micro_batches": len(drawn.rows),
        "tokens": work.tokens,
        "tokens_run": run,
        "tokens_saved": work.tokens - run,
        "largest": int(drawn.nodes.max()),
    }


def _evaluation(planner: Planner) -> dict[str, Any]:
    inference = planner.recipe.inference
    found = planner.passes(inference.tokens_per_pass)
    return {
        "split": planner.work.evaluated,
        "mode": inference.mode,
        "rows": len(planner.work.prompts),
        "times": planner.evaluations,
        "passes": len(found.groups),
        "tokens_run": found.run,
        "operations": planner.evaluation_operations,
    }


def _memory(planner: Planner, choice: Choice) -> dict[str, Any]:
    """Divide what a choice needs at its highest moment, in training or in evaluation."""
    drawing = planner.drawing(choice.quantization)
    stage, highest = "evaluation", choice.evaluation
    if choice.training is not None and not choice.evaluation_is_highest:
        stage, highest = "training", choice.training
    activations = min(highest.saved, highest.peak - highest.peak_logits)
    parts = {
        "weights": drawing.weights,
        "copies": planner.copies(drawing, choice.checkpointing),
        "adapter": drawing.adapter,
        "optimizer": drawing.optimizer,
        "activations": activations,
        "logits": highest.peak_logits,
        "work": choice.peak - choice.fixed - activations - highest.peak_logits,
        "allowance": choice.allowance,
    }
    return {
        "stage": stage,
        **{name: round(size) for name, size in parts.items()},
        "needed": round(choice.needed),
        "fits": planner.fits(choice),
        "training": None if choice.training is None else round(choice.training.peak),
        "evaluation": round(choice.evaluation.peak),
        "logits_at_their_peak": round(
            max(choice.evaluation.logits, 0 if choice.training is None else choice.training.logits)
        ),
    }


def _disk(planner: Planner) -> dict[str, int]:
    drawing = planner.drawing("none")
    return {
        "checkpoints": CHECKPOINTS * (drawing.trainable + drawing.optimizer),
        "adapter": drawing.trainable,
        "merged": drawing.parameters * planner.dtype.itemsize,
    }


def _row(planner: Planner, choice: Choice, best: Choice | None) -> dict[str, Any]:
    fastest = planner.relative(choice if best is None else best)
    return {
        "quantization": choice.quantization,
        "gradient_checkpointing": choice.checkpointing,
        "micro_batch_size": choice.micro_batch_size,
        "train_tokens_per_pass": choice.budget,
        "tokens_per_pass": choice.tokens_per_pass,
        "needed": round(choice.needed),
        "fits": planner.fits(choice),
        "operations": choice.operations,
        "relative_time": planner.relative(choice) / fastest,
        "set": planner.options(choice),
    }


def _verdict(planner: Planner, own: Choice, best: Choice | None) -> str:
    """Say in one line what to do."""
    place = planner.place
    needs = f"{own.needed / GIB:.1f} of {place.capacity / GIB:.1f} GiB"
    if best is None:
        least = min(planner.choices, key=lambda choice: choice.needed)
        return (
            f"DOES NOT FIT {place.name}: the recipe as it is needs {needs}, and what needs least "
            f"({_name(least)}) still {least.needed / GIB:.1f} GiB; take a smaller model or a "
            "larger device"
        )
    if best is own:
        return f"FITS {place.name}: the recipe as it is needs {needs}; run it as it is"
    options = " ".join(f"--set {option}" for option in planner.options(best))
    if planner.fits(own):
        gain = planner.relative(own) / planner.relative(best)
        return (
            f"FITS {place.name}: the recipe as it is needs {needs}; {gain:.2f} times as fast, with "
            f"{best.needed / GIB:.1f} GiB: {options}"
        )
    text = (
        f"DOES NOT FIT {place.name} as it is ({needs}); the fastest that fits, with "
        f"{best.needed / GIB:.1f} GiB: {options}"
    )
    if best.quantization != own.quantization:
        kept = planner.fastest([c for c in planner.choices if c.quantization == own.quantization])
        base = _base(own)
        if kept is None:
            return f"{text} (nothing fits with {base} weights)"
        others = " ".join(f"--set {option}" for option in planner.options(kept))
        slower = planner.relative(kept) / planner.relative(best)
        return f"{text} (with {base} weights, {slower:.1f} times as slow: {others})"
    return text


def _base(choice: Choice) -> str:
    return {"none": "unquantised"}.get(choice.quantization, choice.quantization)


def _name(choice: Choice) -> str:
    parts = [f"{_base(choice)} weights"]
    if choice.training is not None:
        parts += ["gradient checkpointing"] if choice.checkpointing else []
        parts += [f"micro-batches of {choice.micro_batch_size}"]
    return ", ".join(parts)


# --- this machine ---------------------------------------------------------------------------------


def _seconds(planner: Planner, choice: Choice) -> dict[str, float]:
    """Estimate a run's time from the rate of this machine's matrix products at its shapes."""
    drawing = planner.drawing("none")
    if planner.recipe.train is not None:
        nodes = planner.batches(choice.micro_batch_size, choice.budget).nodes
    else:
        nodes = planner.passes(choice.tokens_per_pass).nodes
    rate = product_rate(drawing, int(nodes.mean()), planner.dtype, auto.device())
    return {
        "products_per_second": rate,
        "share_of_products": PRODUCTS,
        "estimate": choice.operations / rate / PRODUCTS,
    }


def _labelling(planner: Planner, seconds: Mapping[str, float] | None, texts: int) -> dict[str, Any]:
    """Estimate what labelling takes: linear in the texts, as `scripts/bench/volume.py` measures."""
    operations = planner.evaluation_operations / len(planner.work.prompts) * texts
    rate = None if seconds is None else seconds["products_per_second"] * PRODUCTS
    return {
        "texts": texts,
        "operations": operations,
        "seconds": None if rate is None else operations / rate,
    }


def product_rate(
    drawing: meta.Drawing, nodes: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Measure operations per second of a layer's products with `nodes` rows, weighted by share."""
    shapes = Counter(
        (module.in_features, module.out_features)
        for module in drawing.base.modules()
        if isinstance(module, nn.Linear)
        and module.in_features * module.out_features > 2**16
        and module is not drawing.base.get_output_embeddings()
    )
    if not shapes:  # tiny models
        shapes = Counter({(256, 256): 1})
    operations = seconds = 0.0
    for (columns, rows), count in shapes.items():
        given = torch.randn(nodes, columns, device=device).to(dtype)
        # One row of numbers, repeated: drawing a hundred million takes longer than the product.
        weight = torch.randn(columns, device=device).to(dtype).expand(rows, columns).contiguous()
        nn.functional.linear(given, weight)
        repeats, started, spent = 0, time.perf_counter(), 0.0
        while spent < RATE_SECONDS and repeats < 1000:
            nn.functional.linear(given, weight)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            repeats, spent = repeats + 1, time.perf_counter() - started
        operations += 2.0 * count * nodes * columns * rows
        seconds += count * spent / repeats
    return operations / seconds


def measured(experiment: Experiment, rows: int = 4) -> dict[str, Any]:
    """Run one small training step here, and return it beside what is predicted for it.

    On a GPU the measure is the allocator's own; on a CPU, the storages that torch's dispatcher
    sees come and go.

    Raises:
        RecipeError: the recipe trains nothing.
        ModelError: the model is not here.
    """
    recipe = experiment.recipe
    if recipe.train is None:
        raise RecipeError("method zero_shot trains nothing, so there is no step to measure")
    base = auto.load(recipe.model, recipe.method)
    encoder = Encoder(base.tokenizer, recipe.prompt.max_length)
    batch = collate(encoder.encode(experiment.render(experiment.rows("train")[:rows])))
    prefix_ids: list[int] = []
    match recipe.method:
        case recipes.PTuningV2(init_text=str(text)):
            prefix_ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    drawing = meta.draw(
        meta.config_of(recipe.model)[0],
        recipe.method,
        dtype=auto.dtype_of(recipe.model, recipe.method),
        quantization=recipe.model.quantization,
    )
    checkpointing = recipe.train.gradient_checkpointing
    device = auto.device()
    predicted = memory.training_step(
        drawing, batch, "cuda" if device.type == "cuda" else "cpu",
        checkpointing=checkpointing, accumulating=False,
    )  # fmt: skip
    model = methods.adapt(base.model, recipe.method, prefix_ids=prefix_ids).train()
    if checkpointing:
        base.model.activation_checkpointing_enable({"use_reentrant": False})
    saved, peak = _real_step(model, batch, device, drawing.ledger.vocabulary)
    return {
        "rows": rows,
        "nodes": len(batch["trie"]),
        "device": str(device),
        "saved": {"predicted": round(predicted.saved), "measured": saved},
        "peak": {"predicted": round(predicted.peak), "measured": peak},
    }


def _real_step(
    model: nn.Module, batch: dict[str, Any], device: torch.device, vocabulary: int
) -> tuple[int, int]:
    """Return the bytes kept for the backward pass, and the most that were alive."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = answer_loss(model, batch)
        saved = torch.cuda.memory_allocated() - before
        loss.backward()  # type: ignore[no-untyped-call]
        return saved, torch.cuda.max_memory_allocated() - before
    ledger = Ledger(device.type, vocabulary)
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.note(tensor)
    with ledger:
        ledger.start()
        loss = answer_loss(model, batch)
        saved = ledger.since()
        loss.backward()  # type: ignore[no-untyped-call]
        return saved, round(ledger.footprint().peak)
