"""Lean layers against those that they replace."""

import copy
import pickle

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llm_emo import training
from llm_emo.lean import lean


def norm(width: int = 24) -> LlamaRMSNorm:
    made = LlamaRMSNorm(width, eps=1e-5).requires_grad_(False)
    made.weight.copy_(torch.rand(width) + 0.5)
    return made


def leaned(module: nn.Module) -> nn.Module:
    own = copy.deepcopy(module)
    lean(own)
    return own


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)])
def test_a_lean_norm_has_the_same_output_and_gradient(shape):
    torch.manual_seed(0)
    usual = norm()
    x = torch.randn(shape, dtype=torch.float32, requires_grad=True)
    before = x.detach().clone()
    weights = torch.randn(shape)
    found, expected = leaned(usual)(x), usual(x)
    torch.testing.assert_close(found, expected)
    one, other = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected))
    torch.testing.assert_close(one, other)
    assert torch.equal(x, before)  # others still read it


def test_a_lean_norm_rounds_no_more_than_the_usual_one():
    torch.manual_seed(0)
    usual = norm()
    x = torch.randn(64, 24) * 10
    exact = usual(x)
    usual.to(torch.bfloat16)
    low = x.bfloat16()
    errors = [(model(low).float() - exact).abs().mean() for model in (leaned(usual), usual)]
    assert leaned(usual)(low).dtype == torch.bfloat16
    assert errors[0] <= 1.05 * errors[1]


def test_a_norm_that_learns_is_left_as_it_is():
    usual = norm().requires_grad_(True)
    own = leaned(usual)
    own(torch.randn(3, 24)).sum().backward()
    assert own.weight.grad is not None


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
@pytest.mark.parametrize("method", tiny.METHODS)
def test_an_adapted_model_has_twins_that_stand_on_their_own(method, twin_of):
    made, rows = tiny.adapted("llama", method), tiny.encoded(5)
    twin = twin_of(made)
    with torch.no_grad():
        before = training.answer_loss(made, training.collate(rows))
        assert torch.equal(training.answer_loss(twin, training.collate(rows)), before)
        for parameter in twin.parameters():
            parameter.zero_()
        assert training.answer_loss(twin, training.collate(rows)) != before
        assert training.answer_loss(made, training.collate(rows)) == before


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 6, bias=False)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def adapted(dropout: float = 0.0, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(
        r=3, lora_alpha=5, lora_dropout=dropout, target_modules=["first", "second"], **options
    )
    model = get_peft_model(Two().to(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def losses(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output, and the gradients of the input and of all that learns."""
    torch.manual_seed(1)  # of dropout
    x = x.detach().requires_grad_()
    out = model(x)
    learning = [p for p in model.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad(out.float().square().sum(), [x, *learning])]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_a_lean_lora_layer_has_the_same_output_and_gradients(dropout, options):
    usual = adapted(dropout, **options)
    x = torch.randn(2, 5, 12)
    for found, expected in zip(losses(leaned(usual), x), losses(usual, x), strict=True):
        assert apart(found, expected) <= 1e-6


def test_a_lean_lora_layer_multiplies_in_the_dtype_of_its_base():
    usual = adapted(dtype=torch.bfloat16)
    assert {p.dtype for n, p in usual.named_parameters() if "lora_" in n} == {torch.float32}
    x = torch.randn(2, 5, 12).bfloat16()
    for found, expected in zip(losses(leaned(usual), x), losses(usual, x), strict=True):
        assert found.dtype == expected.dtype
        assert apart(found, expected) <= 0.02


def test_an_adapter_switched_off_or_merged_is_seen():
    usual = adapted()
    own = leaned(usual)
    x = torch.randn(2, 12)
    with usual.disable_adapter(), own.disable_adapter():
        expected = usual(x)
        torch.testing.assert_close(own(x), expected)
    assert not torch.allclose(own(x), expected)
    merged = own(x)
    own.merge_adapter()
    torch.testing.assert_close(own(x), merged)


def test_methods_leave_no_usual_layer_behind():
    model = tiny.adapted("llama", "lora")
    usual = [
        name
        for name, module in model.named_modules()
        if (type(module).__name__.endswith("RMSNorm") or hasattr(module, "lora_A"))
        and "forward" not in vars(module)
    ]
    assert usual == []
