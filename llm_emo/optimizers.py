"""The optimisers that a recipe can name, with torch's own settings beside the recipe's."""

from collections.abc import Iterable

import torch
from torch import nn

from llm_emo.recipes import Train

MOMENTUM = 0.9
ADAM = (0.9, 0.999)
"""Decay rates of Adam's averages, torch's and transformers' own."""
ADADELTA = 0.95
"""Decay rate of Adadelta's averages, that of its paper (https://arxiv.org/abs/1212.5701, section
4.1), which TextCNN's authors took too. torch's own is 0.9."""


def make(train: Train, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer | None:
    """Return the optimiser of a recipe's training section, over the parameters that learn.

    For the others than AdamW, `weight_decay` is an L2 penalty on all parameters.

    Returns:
        None for `adamw`: transformers makes it, and parts what decays from what does not.
    """
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    rate, decay = train.learning_rate, train.weight_decay
    match train.optimizer:
        case "adam":
            betas = train.betas or ADAM
            return torch.optim.Adam(learning, lr=rate, weight_decay=decay, betas=betas)
        case "sgd":
            return torch.optim.SGD(learning, lr=rate, weight_decay=decay)
        case "sgd_momentum":
            return torch.optim.SGD(learning, lr=rate, weight_decay=decay, momentum=MOMENTUM)
        case "adadelta":
            return torch.optim.Adadelta(learning, lr=rate, weight_decay=decay, rho=ADADELTA)
        case "adamw":
            return None
