"""The optimisers that a recipe can name."""

from pathlib import Path

import pytest
import torch

from llm_emo import optimizers, recipes, training
from llm_emo.errors import RecipeError


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
    assert group.get("rho") == (0.95 if kind == "adadelta" else None)


def test_adam_takes_the_recipes_betas():
    settings = recipes.load("vader/lora").train
    for betas in (None, (0.8, 0.95)):
        chosen = settings.model_copy(update={"optimizer": "adam", "betas": betas})
        optimizer = optimizers.make(chosen, [torch.nn.Parameter(torch.ones(1))])
        assert optimizer.param_groups[0]["betas"] == (betas or (0.9, 0.999))
        arguments = training.training_arguments(Path(), chosen, seed=0, metric="accuracy")
        assert (arguments.adam_beta1, arguments.adam_beta2) == (betas or (0.9, 0.999))


def test_betas_without_adam_are_refused():
    with pytest.raises(RecipeError, match="sgd has none"):
        recipes.load("vader/lora", ["train.optimizer=sgd", "train.betas=[0.9, 0.99]"])
