"""Remedies for rare classes where a model writes its labels."""

from collections import Counter

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from llm_emo import llm_imbalance, training
from llm_emo.baselines.imbalance import class_weights
from llm_emo.baselines.settings import ClassWeights, Focal, LogitAdjustment, Resampling
from llm_emo.encoding import Encoded
from llm_emo.errors import ModelError

ANSWERS = ((7, 8, 2), (7, 9, 2), (11, 2), (7, 8, 12, 13, 2))
"""Two begin alike, one goes on where another ends, and their lengths differ."""

COUNTS = torch.tensor([90, 9, 30, 1])
OPTIONS = (
    None,
    ClassWeights(strength=0.5),
    Resampling(strength=1.0),
    Focal(gamma=1.5),
    Focal(gamma=0.5, balanced=True),
    LogitAdjustment(tau=0.7),
)
options = pytest.mark.parametrize("option", OPTIONS, ids=repr)


def rows(count=9, seed=0):
    """Random prompts with a common beginning, two of them equal, and the labels' answers."""
    prompts = [row.prompt for row in tiny.encoded(count, seed=seed)]
    prompts[-1] = prompts[0]
    return [
        Encoded(f"row-{number}", prompt, ANSWERS[number % len(ANSWERS)])
        for number, prompt in enumerate(prompts)
    ]


def task(option, counts=COUNTS):
    return llm_imbalance.RemediedAnswers(option, ANSWERS, counts)


def summed(option, model, some, counts=COUNTS):
    learning = task(option, counts)
    return learning.loss(model, learning.collate(some))


def gradient(model, value):
    model.zero_grad()
    value.backward()
    return tiny.gradients(model)


def padded_log_probs(model, pairs):
    """Return log P(answer | prompt) of pairs, run side by side with padding and no trie."""
    ids = [torch.tensor([*prompt, *answer]) for prompt, answer in pairs]
    tokens = pad_sequence(ids, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    log_probs = model(input_ids=tokens, attention_mask=mask).logits.log_softmax(-1)
    sums = []
    for row, (prompt, answer) in enumerate(pairs):
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        sums.append(sum(log_probs[row, p, t] for p, t in zip(places, answer, strict=True)))
    return torch.stack(sums)


def expected(option, model, some):
    """The definition of every remedy, in plain words."""
    classes = [ANSWERS.index(row.answer) for row in some]
    if isinstance(option, LogitAdjustment):
        pairs = [(row.prompt, answer) for row in some for answer in ANSWERS]
        scores = padded_log_probs(model, pairs).view(len(some), len(ANSWERS))
        shifted = scores + option.tau * (COUNTS / COUNTS.sum()).log()
        return -shifted.log_softmax(1)[range(len(some)), classes].sum()
    log_p = padded_log_probs(model, [(row.prompt, row.answer) for row in some])
    match option:
        case ClassWeights(strength=strength):
            return -(class_weights(COUNTS, strength)[classes] * log_p).sum()
        case Focal(gamma=gamma, balanced=balanced):
            weights = class_weights(COUNTS, 1.0 if balanced else 0.0)[classes]
            return -(weights * (1 - log_p.exp()) ** gamma * log_p).sum()
    return -log_p.sum()


@options
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "glm"])
def test_loss_and_gradient_are_those_of_the_padded_definition(option, architecture):
    model = tiny.adapted(architecture, "lora")
    model.zero_grad()
    wanted = expected(option, model, rows())
    wanted_gradient = gradient(model, wanted)
    found = summed(option, model, rows())
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert tiny.distance(gradient(model, found), wanted_gradient) < 1e-5


@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize(
    "option",
    [None, Resampling(strength=1.0), ClassWeights(strength=0.0), Focal(gamma=0.0)],
    ids=repr,
)
def test_every_remedy_at_nothing_is_plain_training(option, method):
    model = tiny.adapted("llama", method)
    plain = training.answer_loss(model, training.collate(rows()))
    wanted = gradient(model, plain)
    found = summed(option, model, rows())
    assert found.item() == pytest.approx(plain.item(), rel=1e-6)
    assert tiny.distance(gradient(model, found), wanted) < 1e-6


@pytest.mark.parametrize(
    "option", [ClassWeights(strength=1.0), Focal(gamma=0, balanced=True)], ids=repr
)
def test_weights_of_equal_classes_leave_the_gradient_plain(option):
    model = tiny.adapted("llama", "lora")
    wanted = gradient(model, training.answer_loss(model, training.collate(rows())))
    found = summed(option, model, rows(), torch.full((4,), 7))
    assert tiny.distance(gradient(model, found), wanted) < 1e-6


def test_a_prior_of_equal_classes_adjusts_nothing():
    model = tiny.adapted("llama", "lora")
    equal = torch.full((4,), 7)
    wanted = gradient(model, summed(LogitAdjustment(tau=0.0), model, rows()))
    found = gradient(model, summed(LogitAdjustment(tau=1.0), model, rows(), equal))
    assert tiny.distance(found, wanted) < 1e-5


def test_adjusted_scores_are_those_that_score_mode_compares():
    from llm_emo.inference import score

    model = tiny.adapted("llama", "lora")
    some = rows()
    batch = task(LogitAdjustment(tau=1.0)).collate(some)
    with torch.inference_mode():
        found = llm_imbalance.sequence_log_probs(model, batch).view(len(some), -1)
    scored = dict(score(model, [row.prompt for row in some], ANSWERS, tokens_per_pass=512))
    wanted = torch.tensor([scored[row] for row in range(len(some))])
    assert torch.allclose(found, wanted, atol=1e-4)


@options
def test_how_a_step_is_cut_into_passes_changes_nothing(option):
    model = tiny.adapted("llama", "lora")
    some = rows()
    wanted = gradient(model, summed(option, model, some))
    parts = [some[:4], some[4:5], [], some[5:]]
    found = gradient(model, sum(summed(option, model, part) for part in parts))
    assert tiny.distance(found, wanted) < 1e-5
    sizes = [task(option).size(task(option).collate(part)) for part in (*parts, some)]
    for name in ("targets", "examples"):
        counted = [getattr(size, name) for size in sizes]
        assert sum(counted[:-1]) == counted[-1]


@options
def test_a_pass_without_rows_adds_nothing_and_leaves_no_parameter_out(option):
    model = tiny.adapted("llama", "lora")
    batch = task(option).collate([])
    assert task(option).size(batch) == training.Size(0, 0, 0, 0)
    value = task(option).loss(model, batch)
    assert value.item() == 0
    assert not gradient(model, value).any()


def test_a_step_is_divided_by_what_its_sum_runs_over():
    some = rows()
    tokens = sum(len(row.answer) for row in some)
    for option in OPTIONS:
        size = task(option).size(task(option).collate(some))
        assert size.targets == (len(some) if isinstance(option, LogitAdjustment) else tokens)
        assert size.examples == len(some)


@options
def test_a_row_runs_no_more_tokens_than_it_is_counted_for(option):
    for row in rows():
        trie = task(option).collate([row])["trie"]
        assert len(row.prompt) <= len(trie) <= llm_imbalance.nodes_at_most(option, row, ANSWERS)


def test_a_rare_class_pulls_harder():
    model = tiny.adapted("llama", "lora")
    common, rare = rows()[0], rows()[3]  # of 90 and of 1
    for option in (ClassWeights(strength=1.0), Focal(gamma=0.0, balanced=True)):
        pulls = [
            (summed(option, model, [row]) / summed(None, model, [row])).item()
            for row in (common, rare)
        ]
        assert pulls[1] > 10 * pulls[0]
    # The adjusted loss of a rare answer is larger, because the prior speaks against it.
    for row, sign in ((common, -1), (rare, 1)):
        change = summed(LogitAdjustment(tau=1.0), model, [row]) - summed(
            LogitAdjustment(tau=0.0), model, [row]
        )
        assert sign * change.item() > 0


def test_every_parameter_of_an_adapter_learns_under_every_remedy():
    for option in OPTIONS:
        model = tiny.adapted("llama", "lora")
        model.zero_grad()
        summed(option, model, rows()).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, (option, name)
                assert parameter.grad.any(), (option, name)


# --- classes and order --------------------------------------------------------------------------


def test_a_row_is_of_the_class_whose_answer_it_has():
    assert llm_imbalance.classes_of(rows(6), ANSWERS).tolist() == [0, 1, 2, 3, 0, 1]


def test_an_answer_of_no_label_is_refused_by_the_row():
    foreign = Encoded("row-x", (5, 6), (7, 2))
    with pytest.raises(ModelError, match=r"row row-x: its answer \[7, 2\] is that of no label"):
        llm_imbalance.classes_of([*rows(), foreign], ANSWERS)


def test_labels_that_the_tokenizer_cannot_tell_apart_are_refused():
    with pytest.raises(ModelError, match="two labels with the same ids"):
        llm_imbalance.classes_of(rows(), (*ANSWERS, ANSWERS[0]))


def skewed(count=80):
    prompts = [row.prompt for row in tiny.encoded(count)]
    return [
        Encoded(f"row-{number}", prompt, ANSWERS[3 if number % 10 == 0 else 0])
        for number, prompt in enumerate(prompts)
    ]


@settings(deadline=None, max_examples=20)
@given(strength=st.floats(0, 1), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 50))
def test_an_epoch_is_as_long_with_resampling_and_a_function_of_seed_and_epoch(
    strength, seed, epoch
):
    some, option = skewed(), Resampling(strength=strength)
    drawn = llm_imbalance.order(option, some, ANSWERS, seed=seed, epoch=epoch)
    assert drawn == llm_imbalance.order(option, some, ANSWERS, seed=seed, epoch=epoch)
    assert len(drawn) == len(some)
    rare = sum(some[row].answer == ANSWERS[3] for row in drawn)
    assert rare == pytest.approx(80 * (strength / 2 + (1 - strength) / 10), abs=1)


@pytest.mark.parametrize(
    "option", [option for option in OPTIONS if not isinstance(option, Resampling)], ids=repr
)
def test_without_resampling_an_epoch_has_every_row_once(option):
    drawn = llm_imbalance.order(option, skewed(), ANSWERS, seed=1, epoch=2)
    assert Counter(drawn) == Counter(range(80))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@options
def test_a_gpu_gives_the_same_loss(option):
    model = tiny.adapted("llama", "lora")
    wanted = float(summed(option, model, rows()))
    assert float(summed(option, model.cuda(), rows())) == pytest.approx(wanted, rel=1e-4)
