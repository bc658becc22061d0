"""What all specialised models share."""

import pytest
import torch
from torch import nn

from llm_emo.baselines.classifier import lent_gpu


@pytest.mark.parametrize("there", [True, False])
def test_a_frozen_model_leaves_the_gpu_whatever_happens(there, monkeypatch):
    model, moves = nn.Linear(1, 1), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(model, "cuda", lambda: moves.append("gpu"))
    monkeypatch.setattr(model, "cpu", lambda: moves.append("cpu"))
    with pytest.raises(ZeroDivisionError), lent_gpu(model):
        moves.append(1 / len(moves[:0]))
    assert moves == [*["gpu"] * there, "cpu"]
