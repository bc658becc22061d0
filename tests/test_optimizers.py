"""The optimisers that a recipe can name."""

import pytest
import torch

from llm_emo import optimizers, recipes


@pytest.mark.parametrize("kind", ["adam", "sgd", "sgd_momentum", "adadelta"])
def test_every_optimizer_goes_downhill_with_the_recipes_numbers(kind):
    settings = recipes.load("vader/lora").train
    settings = settings.model_copy(update={"optimizer": kind, "weight_decay": 0.25})
    weight, frozen = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    frozen.requires_grad_(False)
    optimizer = optimizers.make(settings, [weight, frozen])
    for _ in range(20):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert weight.norm() < torch.ones(3).norm()
    assert torch.equal(frozen, torch.ones(3))
    assert type(optimizer).__name__.lower() == kind.partition("_")[0]
    [group] = optimizer.param_groups
    assert group["lr"] == settings.learning_rate
    assert group["weight_decay"] == 0.25
    assert group.get("momentum", 0) == (0.9 if kind == "sgd_momentum" else 0)
