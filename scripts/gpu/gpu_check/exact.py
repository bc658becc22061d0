"""Exactness in float32 on a small model: what is the same by theory is the same on this device.

Each figure stands beside the bound that it must keep. Rounding in float32 is about 1e-7 a step;
a wrong mask, position, target or kernel is off by orders of magnitude more than the bounds.
"""

import copy
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpu_check import infer, model, padded, train
from gpu_check.turns import say
from llm_emo import methods, recipes
from llm_emo.encoding import Encoded
from llm_emo.inference import Ids
from llm_emo.models.chatglm2 import Layout

GRADIENTS = 1e-5
"""Relative difference of gradients, in Frobenius norm."""
LOSS = 1e-5
"""Relative difference of losses."""
DEVICES = 1e-4
"""Relative difference of gradients between this device and the CPU."""
SCORES = 1e-3
"""Difference of log-probabilities, in nats."""
METHODS = ("lora", "p_tuning_v2")


def adapted(layout: Layout, method: recipes.Method, device: torch.device, seed: int) -> Any:
    """Return a small model in float32 and its adapted form, whose adapter is not the identity."""
    base = model.build(
        layout, dtype=torch.float32, quantization="none", device=device, seed=seed
    )  # fmt: skip
    torch.manual_seed(seed)
    made = methods.adapt(base, method)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    return base, made


def without_dropout(recipe: recipes.Recipe) -> recipes.Recipe:
    """Return the recipe with dropout 0: through the trie, tokens that rows share share a mask."""
    method = recipe.method.model_copy(update={"dropout": 0.0})
    return recipe.model_copy(update={"method": method})


def gradients(made: nn.Module, loss: train.Loss, rows: Sequence[Encoded]) -> tuple[float, Tensor]:
    """Return the rows' loss and the gradients of all that learns, shape (parameters,), float64."""
    value = train.whole(loss, rows, len(rows), backward=True)
    found = []
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} got no gradient"
            found.append(parameter.grad.flatten().double().cpu())
            parameter.grad = None
    return float(value), torch.cat(found)


def apart(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|."""
    return float((a - b).norm() / b.norm())


def check(name: str, value: float, bound: float) -> dict[str, Any]:
    """Return one line of the record; not a number is not within any bound."""
    passed = bool(value <= bound)
    say(f"    {name}: {value:.1e} (bound {bound:.0e}){'' if passed else '  FAILED'}")
    # JSON has no NaN.
    shown = value if math.isfinite(value) else None
    return {"check": name, "value": shown, "bound": bound, "passed": passed}


def of_method(
    layout: Layout, recipe: recipes.Recipe, rows: Sequence[Encoded], *,
    device: torch.device, seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Compare loss and gradients of one batch, computed in every way there is."""
    recipe = without_dropout(recipe)
    base, made = adapted(layout, recipe.method, device, seed)
    kind = recipe.method.kind
    made.train()
    loss, through_trie = gradients(made, train.trie_loss(made), rows)
    plain_loss, reference = gradients(made, train.padded_loss(made), rows)
    found = [
        check(f"{kind}: loss, trie and padded", abs(loss - plain_loss) / abs(plain_loss), LOSS),
        check(f"{kind}: gradients, trie and padded", apart(through_trie, reference), GRADIENTS),
    ]
    _, wide = gradients(made, train.padded_loss(made, padded.ORIGINAL_WIDTH), rows)
    found.append(check(f"{kind}: gradients, trie and wide", apart(through_trie, wide), GRADIENTS))

    base.activation_checkpointing_enable({"use_reentrant": False})
    _, recomputed = gradients(made, train.trie_loss(made), rows)
    base.activation_checkpointing_disable()
    found.append(
        check(f"{kind}: gradients, recomputed", apart(recomputed, through_trie), GRADIENTS)
    )
    twin = copy.deepcopy(made).cpu()  # on a CPU nothing but a copy
    _, there = gradients(twin, train.trie_loss(twin), rows)
    found.append(check(f"{kind}: gradients, here and on the CPU",
                       apart(through_trie, there), DEVICES))  # fmt: skip
    del twin
    first = first_loss_of_trainer(made, recipe, rows, seed)
    found.append(check(f"{kind}: loss, trainer and padded",
                       abs(first - plain_loss) / abs(plain_loss), LOSS))  # fmt: skip
    return found


def first_loss_of_trainer(
    made: nn.Module, recipe: recipes.Recipe, rows: Sequence[Encoded], seed: int
) -> float:
    """Train one step with the loop of `llm-emo train`, in two passes; return the step's loss."""
    from llm_emo.steps import Steps
    from llm_emo.training import EmoTrainer, training_arguments

    assert recipe.train is not None
    settings = recipe.train.model_copy(
        update={"epochs": 1, "batch_size": len(rows), "micro_batch_size": len(rows) // 2}
    )
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = EmoTrainer(
            made,
            training_arguments(Path(folder), settings, seed=seed, metric="none"),
            rows=rows,
            steps=Steps(rows, settings, seed=seed),
            validate=lambda model: {"none": 0.0},
            callbacks=[],
        )
        step = trainer.training_step

        def recorded(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            losses.append(float(loss))
            return loss

        trainer.training_step = recorded  # type: ignore[method-assign]
        trainer.train()
    assert len(losses) == 1, losses
    return losses[0]


def of_answers(
    layout: Layout, rows: Sequence[Encoded], answers: Sequence[Ids], *,
    new_tokens: int, device: torch.device, seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Compare the answers of the unadapted model, through the trie and from padded rows."""
    base = model.build(layout, dtype=torch.float32, quantization="none", device=device, seed=seed)
    made = methods.adapt(base, recipes.ZeroShot(kind="zero_shot"))
    made.eval()
    prompts = [row.prompt for row in rows]
    ours = infer.trie_generate(made, prompts, new_tokens)
    with padded.stock_attention(base):
        theirs = padded.generate(base, prompts, new_tokens)
        plain = padded.score(made, prompts, answers).double().cpu()
    scored = torch.tensor(infer.trie_score(made, prompts, answers), dtype=torch.float64)
    other = sum(a != b for left, right in zip(ours, theirs, strict=True)
                for a, b in zip(left, right, strict=True))  # fmt: skip
    return [
        check("generated tokens that differ, trie and padded", other, 0),
        check("log-probabilities, trie and padded", float((scored - plain).abs().max()), SCORES),
    ]


def compare(
    layout: Layout, rows: Sequence[Encoded], answers: Sequence[Ids],
    of: dict[str, recipes.Recipe], *, new_tokens: int, device: torch.device, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Run all checks; `of` maps a method to its recipe."""
    torch.set_float32_matmul_precision("highest")  # ten bits of mantissa are no float32
    found = []
    for recipe in of.values():
        found += of_method(layout, recipe, rows, device=device, seed=seed)
    found += of_answers(layout, rows, answers, new_tokens=new_tokens, device=device, seed=seed)
    return {"checks": found, "passed": all(check["passed"] for check in found)}
