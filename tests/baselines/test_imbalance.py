"""Losses and row orders for rare classes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_emo.baselines import imbalance
from llm_emo.baselines.settings import (
    ClassWeights,
    Focal,
    LogitAdjustment,
    Resampling,
)

COUNTS = torch.tensor([90, 9, 1])
OPTIONS = (
    None,
    ClassWeights(strength=1.0),
    Resampling(strength=1.0),
    Focal(gamma=2.0),
    Focal(gamma=0.5, balanced=True),
    LogitAdjustment(tau=1.0),
)


def batch(rows=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, 3, generator=generator)
    return logits, torch.randint(0, 3, (rows,), generator=generator)


def losses(option, counts=COUNTS):
    logits, labels = batch()
    return imbalance.row_losses(option, logits, labels, counts)


@pytest.mark.parametrize(
    "option",
    [
        ClassWeights(strength=0.0),
        Focal(gamma=0.0),
        LogitAdjustment(tau=0.0),
        Resampling(strength=1.0),
    ],
    ids=repr,
)
def test_every_option_at_nothing_is_cross_entropy(option):
    assert torch.allclose(losses(option), losses(None), atol=1e-6)


@pytest.mark.parametrize(
    "option",
    [ClassWeights(strength=1.0), LogitAdjustment(tau=1.0), Focal(gamma=0, balanced=True)],
    ids=repr,
)
def test_equal_classes_leave_the_gradient_plain(option):
    logits, labels = batch()
    equal = torch.tensor([7, 7, 7])
    found = []
    for choice in (option, None):
        leaf = logits.clone().requires_grad_()
        imbalance.row_losses(choice, leaf, labels, equal).mean().backward()
        found.append(leaf.grad)
    assert torch.allclose(*found, atol=1e-7)


def test_whole_class_weights_are_rows_over_classes_times_count():
    weights = imbalance.class_weights(COUNTS, 1.0)
    assert weights.tolist() == pytest.approx([100 / 3 / 90, 100 / 3 / 9, 100 / 3])


@given(
    counts=st.lists(st.integers(0, 500), min_size=2, max_size=8).filter(any),
    strength=st.floats(0, 1),
)
def test_class_weights_have_mean_one_over_the_training_rows(counts, strength):
    counts = torch.tensor(counts)
    weights = imbalance.class_weights(counts, strength)
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1, rel=1e-5)
    assert (weights > 0).all()


def test_the_focal_loss_is_its_formula():
    logits, labels = batch()
    p = logits.double().softmax(1)[torch.arange(len(labels)), labels]
    expected = -((1 - p) ** 2) * p.log()
    found = imbalance.row_losses(Focal(gamma=2.0), logits, labels, COUNTS)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_focal_loss_has_a_gradient_everywhere(gamma, scale):
    logits = (torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0]]) * scale).requires_grad_()
    imbalance.focal(logits, torch.tensor([0, 0, 1]), gamma).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_the_focal_gradient_is_that_of_finite_differences():
    logits, labels = batch(5)
    leaf = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: imbalance.focal(x, labels, 2.0), leaf)


def test_a_right_row_counts_less_under_the_focal_loss_the_surer_it_is():
    logits = torch.tensor([[0.0, 0, 0], [2.0, 0, 0], [6.0, 0, 0]])
    labels = torch.tensor([0, 0, 0])
    share = imbalance.focal(logits, labels, 2.0) / imbalance.focal(logits, labels, 0.0)
    assert share[0] > share[1] > share[2]


def test_logit_adjustment_is_cross_entropy_over_logits_plus_log_prior():
    logits, labels = batch()
    shifted = logits + 2 * torch.tensor([0.9, 0.09, 0.01]).log()
    expected = torch.nn.functional.cross_entropy(shifted, labels, reduction="none")
    found = imbalance.row_losses(LogitAdjustment(tau=2.0), logits, labels, COUNTS)
    assert torch.allclose(found, expected, atol=1e-5)


def test_logit_adjustment_learns_scores_without_the_prior():
    """The optimum on rows whose features say nothing is a tie, where plain says the majority."""
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    found = {}
    for option in (None, LogitAdjustment(tau=1.0)):
        scores = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.LBFGS([scores], max_iter=100)

        def loss(scores=scores, option=option, optimizer=optimizer):
            optimizer.zero_grad()
            rows = imbalance.row_losses(option, scores.expand(100, 3), labels, COUNTS)
            rows.mean().backward()
            return rows.mean()

        optimizer.step(loss)
        found[type(option)] = scores.detach()
    assert float(found[type(None)].max() - found[type(None)].min()) == pytest.approx(
        math.log(90), abs=0.05
    )
    assert float(found[LogitAdjustment].max() - found[LogitAdjustment].min()) < 0.05


@pytest.mark.parametrize("option", OPTIONS, ids=repr)
def test_a_class_without_training_rows_breaks_no_number(option):
    logits, labels = batch()
    logits.requires_grad_()
    counts = torch.tensor([5, 3, 0])
    rows = imbalance.row_losses(option, logits, labels % 2, counts)
    rows.mean().backward()
    assert torch.isfinite(rows).all()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("option", OPTIONS, ids=repr)
def test_a_row_has_the_same_loss_in_every_company(option):
    logits, labels = batch()
    whole = imbalance.row_losses(option, logits, labels, COUNTS)
    part = imbalance.row_losses(option, logits[3:5], labels[3:5], COUNTS)
    assert torch.equal(whole[3:5], part)


@pytest.mark.parametrize("option", OPTIONS, ids=repr)
def test_log_probabilities_serve_as_logits(option):
    logits, labels = batch()
    own = imbalance.row_losses(option, logits, labels, COUNTS)
    normal = imbalance.row_losses(option, logits.log_softmax(1), labels, COUNTS)
    assert torch.allclose(own, normal, atol=1e-5)


LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array)


@given(labels=LABELS, seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 99))
@settings(max_examples=50)
def test_without_resampling_every_row_comes_once(labels, seed, epoch):
    order = imbalance.epoch_order(None, labels, seed=seed, epoch=epoch)
    assert sorted(order) == list(range(len(labels)))


@given(labels=LABELS, seed=st.integers(0, 2**32 - 1), strength=st.floats(0, 1))
@settings(max_examples=100)
def test_resampling_keeps_the_length_and_fills_every_quota(labels, seed, strength):
    order = imbalance.epoch_order(Resampling(strength=strength), labels, seed=seed, epoch=1)
    assert len(order) == len(labels)
    classes, counts = np.unique(labels, return_counts=True)
    drawn = np.bincount(labels[order], minlength=5)[classes]
    wanted = strength * len(labels) / len(classes) + (1 - strength) * counts
    assert np.abs(drawn - wanted).max() < 1 + 1e-6


@given(labels=LABELS, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_rows_of_a_class_occur_equally_often_or_once_more(labels, seed):
    order = imbalance.epoch_order(Resampling(strength=1.0), labels, seed=seed, epoch=0)
    times = np.bincount(order, minlength=len(labels))
    for label in np.unique(labels):
        own = times[labels == label]
        assert own.max() - own.min() <= 1


def test_the_order_is_a_function_of_seed_and_epoch():
    labels = np.array([0] * 50 + [1] * 5)

    def order(seed, epoch):
        return imbalance.epoch_order(Resampling(strength=1.0), labels, seed=seed, epoch=epoch)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_other_epochs_show_other_rows_of_a_class_that_is_cut():
    labels = np.array([0] * 90 + [1] * 10)
    orders = [
        imbalance.epoch_order(Resampling(strength=1.0), labels, seed=0, epoch=e) for e in range(20)
    ]
    assert len({row for order in orders for row in order}) == 100


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClassWeights(strength=2),
        lambda: Resampling(strength=-1),
        lambda: Focal(gamma=-1),
        lambda: LogitAdjustment(tau=-1),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="Input should be"):
        make()
