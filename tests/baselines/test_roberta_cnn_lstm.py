"""Stage 2: dialogues of utterance features."""

import itertools

import pytest
import torch
from torch.nn import functional

from llm_emo.baselines import roberta_cnn_lstm, storage
from llm_emo.baselines.roberta_cnn_lstm import MaskedBatchNorm, RobertaCnnLstm
from llm_emo.baselines.settings import RobertaCnnLstmSettings

ABLATIONS = [
    {"cnn_lstm": cnn, "residual": residual}
    for cnn, residual in itertools.product((True, False), repeat=2)
]
each_ablation = pytest.mark.parametrize("ablation", ABLATIONS, ids=str)


def network(seed=0, inputs=12, classes=7, **changes):
    torch.manual_seed(seed)
    fields = {
        "cnn_lstm": True, "residual": True, "dropout": 0.0, "reduced": 10, "units": 6, "head": 32,
    }  # fmt: skip
    settings = RobertaCnnLstmSettings(**fields | changes)
    return RobertaCnnLstm(settings, inputs=inputs, classes=classes)


def dialogues(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 12, generator=generator) for length in lengths]


LENGTHS = (1, 2, 3, 4, 7, 8)


def linear(inputs, outputs):
    return inputs * outputs + outputs


def lstm(inputs, units):
    """One layer, both directions, with torch's two biases."""
    return 2 * (4 * units * (inputs + units) + 8 * units)


@each_ablation
def test_it_has_the_parameters_of_the_paper(ablation):
    sizes = {"reduced": 1024, "units": 256, "head": 256}
    settings = RobertaCnnLstmSettings(**ablation, **sizes, dropout=0.1)
    made = RobertaCnnLstm(settings, inputs=4096, classes=7)
    expected = linear(4096, 1024) + linear(1024, 256) + linear(256, 7)
    if settings.cnn_lstm:
        expected += lstm(1024, 256) + lstm(512, 256)  # two stacked layers
        expected += 1024 * 256 * 3 + 256 + 2 * 256 + lstm(256, 256)  # convolution, norm, LSTM
    if settings.residual:
        expected += linear(4096, 1024) + linear(1024, 1024)
    assert sum(p.numel() for p in made.parameters()) == expected


@each_ablation
@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_nothing(ablation, training):
    """Whatever stands in it, however much there is of it; also for gradients and statistics."""
    features, lengths = roberta_cnn_lstm.pad(dialogues(*LENGTHS))
    beyond = roberta_cnn_lstm.turns_beyond(lengths, features.shape[1])
    noisy = torch.cat([features.masked_fill(beyond[..., None], torch.nan),
                       torch.full((len(LENGTHS), 5, 12), torch.inf)], 1)  # fmt: skip
    found = []
    for given in (features, noisy):
        made = network(**ablation).train(training)
        logits = made(given, lengths)[:, :8][~beyond]
        logits.square().sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in made.parameters()])
        found.append((logits, gradients, *made.buffers()))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=1e-4, atol=1e-5)


@each_ablation
def test_a_dialogue_has_the_same_scores_in_every_company(ablation):
    parts = dialogues(*LENGTHS)
    made = network(**ablation).eval()
    together = made(*roberta_cnn_lstm.pad(parts))
    assert together.shape == (6, 8, 7)
    for part, scores in zip(parts, together, strict=True):
        alone = made(part[None], torch.tensor([len(part)]))[0]
        assert torch.allclose(scores[: len(part)], alone, atol=1e-5)


def test_statistics_are_those_of_the_turns_that_are_there():
    norm, values = MaskedBatchNorm(3), torch.randn(4, 5, 3)
    there = ~roberta_cnn_lstm.turns_beyond(torch.tensor([5, 1, 3, 2]), 5)
    found = norm(values, there)
    real = values[there]
    expected = (real - real.mean(0)) / (real.var(0, unbiased=False) + norm.eps).sqrt()
    assert torch.allclose(found[there], expected, atol=1e-5)
    assert not found[~there].any()
    assert torch.allclose(norm.running_mean, 0.1 * real.mean(0), atol=1e-6)


def test_a_single_turn_is_trained_on_by_the_running_statistics():
    made = network()
    before = [buffer.clone() for buffer in made.buffers()]
    logits = made(dialogues(1)[0][None], torch.tensor([1]))
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.equal(a, b) for a, b in zip(before, made.buffers(), strict=True))


def test_every_turn_sees_all_turns_of_its_dialogue_and_no_other():
    made = network().eval()
    features, lengths = roberta_cnn_lstm.pad(dialogues(7, 4))
    leaf = features.requires_grad_()
    for turn in range(7):
        [gradient] = torch.autograd.grad(made(leaf, lengths)[0, turn].sum(), leaf)
        assert gradient[0].abs().sum(1).gt(0).all(), turn
        assert not gradient[1].any()


@pytest.mark.parametrize("ablation", ABLATIONS[2:], ids=str)
def test_without_the_branches_every_turn_stands_alone(ablation):
    made = network(**ablation).eval()
    leaf = dialogues(5)[0][None].requires_grad_()
    [gradient] = torch.autograd.grad(made(leaf, torch.tensor([5]))[0, 2].sum(), leaf)
    assert gradient[0].any(1).tolist() == [False, False, True, False, False]


def test_an_utterance_takes_the_window_that_covers_it():
    """The stride-2 branch: neighbours 2j and 2j + 1 share the window that is centred on 2j."""
    branches = network().branches.eval()
    turns = torch.randn(1, 7, 10)
    near = branches(turns, torch.tensor([7]))[0, :, 12:]
    for turn in range(7):
        assert torch.equal(near[turn], near[turn // 2 * 2])
    assert not torch.allclose(near[0], near[2])
    # The window of utterances 2 and 3, before any LSTM, is the convolution around 2.
    weight, bias = branches.convolution.weight, branches.convolution.bias
    expected = (weight * turns[0, 1:4].T).sum((1, 2)) + bias
    assert torch.allclose(branches.convolution(turns.transpose(1, 2))[0, :, 1], expected, atol=1e-5)


@each_ablation
def test_every_parameter_gets_a_gradient(ablation):
    made = network(**ablation, dropout=0.1)
    features, lengths = roberta_cnn_lstm.pad(dialogues(*LENGTHS))
    made(features, lengths).square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@each_ablation
def test_it_overfits_32_rows(ablation):
    made = network(**ablation, reduced=32, units=16, head=32)
    features, lengths = roberta_cnn_lstm.pad(dialogues(8, 8, 7, 5, 3, 1))
    there = ~roberta_cnn_lstm.turns_beyond(lengths, 8)
    labels = torch.arange(32) % 7
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        logits = made(features, lengths)[there]
        if (logits.argmax(1) == labels).all():
            return
        functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    pytest.fail("not all rows are right")


@each_ablation
def test_saved_and_loaded_it_gives_the_same_bits(ablation, tmp_path):
    made = network(**ablation, dropout=0.5)
    features, lengths = roberta_cnn_lstm.pad(dialogues(*LENGTHS))
    made(features, lengths)  # moves the running statistics, which must be saved too
    storage.save_weights(tmp_path / "model.safetensors", made.eval())
    again = network(seed=9, **ablation, dropout=0.5).eval()
    assert not torch.equal(again(features, lengths), made(features, lengths))
    storage.load_weights(tmp_path / "model.safetensors", again)
    assert torch.equal(again(features, lengths), made(features, lengths))


@pytest.mark.parametrize("wrong", [{"units": 0}, {"dropout": 1.0}, {"head": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="Input should be"):
        network(**wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@each_ablation
def test_a_gpu_gives_the_same_scores(ablation, tmp_path):
    made = network(**ablation).eval()
    features, lengths = roberta_cnn_lstm.pad(dialogues(*LENGTHS))
    there = ~roberta_cnn_lstm.turns_beyond(lengths, 8)
    expected = made(features, lengths)[there]
    found = made.cuda()(features.cuda(), lengths.cuda()).cpu()[there]
    assert torch.allclose(found, expected, atol=1e-4)
    storage.save_weights(tmp_path / "model.safetensors", made)
