"""What holds for every network of paper 004, and what sets each variant apart."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from llm_emo import recipes
from llm_emo.baselines import acoustic
from llm_emo.baselines.cat import Cat
from llm_emo.baselines.ilt import Ilt
from llm_emo.baselines.speech_settings import IltSettings

CLASSES = 4
ILT, CAT = (recipes.load(f"iemocap/{kind}").method.network for kind in ("ilt", "cat"))


def changed(settings, **fields):
    return settings.model_copy(update=fields)


SHIPPED_CNN, SHIPPED_TRANSFORMER = ILT.cnn, ILT.transformer
SMALL = {
    "cnn": changed(SHIPPED_CNN, channels=(2, 4), dropout=0.0),  # 40 features
    "transformer": changed(SHIPPED_TRANSFORMER, inner=16, dropout=0.0),
}

VARIANTS = {
    "ILT, concatenation": changed(ILT, fusion="concatenation"),
    "ILT, sum": changed(ILT, fusion="sum", weight=0.3),
    "ILT, trainable sum": ILT,
    "ILT, positions": changed(ILT, positional_encoding=True),
    "CNN-transformer": changed(ILT, structure="cnn_transformer"),
    "CNN-LSTM-transformer": changed(ILT, structure="cnn_lstm_transformer"),
    "CAT": CAT,
    "CAT, positions": changed(CAT, positional_encoding=True),
    "CAT, CNN to LSTM": changed(CAT, structure="cnn_to_lstm"),
    "CAT, LSTM to CNN": changed(CAT, structure="lstm_to_cnn"),
    "CNN+LSTM": changed(CAT, structure="cnn_plus_lstm"),
    "LSTM-transformer": changed(CAT, structure="lstm_transformer"),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def network(name, *, small=True, seed=0, **changes):
    settings = changed(VARIANTS[name], **(SMALL if small else {}) | changes)
    torch.manual_seed(seed)
    made = Ilt if isinstance(settings, IltSettings) else Cat
    return made(settings, CLASSES)


def clips(*frames, seed=0):
    """Log-mels around -40 dB, as speech has them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 40, generator=generator) * 15 - 40 for n in frames]


def batch(made, to=None, padding=-100.0):
    lengths = torch.tensor([len(clip) for clip in made])
    features = torch.full((len(made), to or int(lengths.max()), 40), padding)
    for row, clip in zip(features, made, strict=True):
        row[: len(clip)] = clip
    return features, lengths


def gradient(made):
    return torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])


# Sizes


def cnn_parameters(channels=(16, 32, 64, 128)):
    pairs = zip((1, *channels), channels, strict=False)
    return sum(9 * a * b + 2 * b for a, b in pairs)  # 3 x 3 without bias; scale and shift


def lstm_parameters(features, units):
    return 2 * 4 * units * (features + units + 2)  # two directions, four gates, two biases


def transformer_parameters(size=256, inner=512):
    attention = 4 * size * (size + 1)
    return attention + (size + 1) * inner + (inner + 1) * size + 2 * 2 * size


CNN, TRANSFORMER = cnn_parameters(), transformer_parameters()
ON_CNN, ON_SOUND = lstm_parameters(256, 128), 40 * 8 * 128 + 128 + lstm_parameters(128, 128)
OUT = 257 * CLASSES
PARAMETERS = {
    "ILT, concatenation": CNN + ON_CNN + 256 + TRANSFORMER + 513 * CLASSES,
    "ILT, sum": CNN + ON_CNN + 256 + TRANSFORMER + OUT,
    "ILT, trainable sum": CNN + ON_CNN + 256 + TRANSFORMER + OUT + 2,
    "ILT, positions": CNN + ON_CNN + 256 + TRANSFORMER + OUT + 2,
    "CNN-transformer": CNN + TRANSFORMER + OUT,
    "CNN-LSTM-transformer": CNN + ON_CNN + TRANSFORMER + OUT,
    "CAT": CNN + ON_SOUND + 2 * TRANSFORMER + OUT,
    "CAT, positions": CNN + ON_SOUND + 2 * TRANSFORMER + OUT,
    "CAT, CNN to LSTM": CNN + ON_SOUND + TRANSFORMER + OUT,
    "CAT, LSTM to CNN": CNN + ON_SOUND + TRANSFORMER + OUT,
    "CNN+LSTM": CNN + ON_SOUND + OUT,
    "LSTM-transformer": ON_SOUND + TRANSFORMER + OUT,
}


@every_variant
def test_a_network_has_the_parameters_of_its_formula(name):
    made = network(name, small=False)
    assert sum(p.numel() for p in made.parameters()) == PARAMETERS[name]


@every_variant
def test_7_5_seconds_become_one_number_a_class(name):
    made = network(name, small=False).eval()
    assert made(*batch(clips(750, 200))).shape == (2, CLASSES)


def test_750_frames_become_46_steps_of_256_features():
    cnn = acoustic.Cnn(40, SHIPPED_CNN)
    steps, lengths = cnn(torch.zeros(1, 750, 40), torch.tensor([750]))
    assert steps.shape == (1, 46, 256)
    assert lengths.tolist() == [46]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (changed(ILT, cnn=changed(SHIPPED_CNN, channels=(2,) * 6)), "leave 0 mel bands"),
        (changed(ILT, cnn=changed(SHIPPED_CNN, channels=(1, 1, 1))), "an even number"),
        (changed(CAT, transformer=changed(SHIPPED_TRANSFORMER, heads=3)), "3 heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        (Ilt if isinstance(settings, IltSettings) else Cat)(settings, CLASSES)


# Padding


@every_variant
def test_padding_changes_no_answer_and_no_gradient(name):
    made = network(name).train()
    twin = copy.deepcopy(made)
    rows = clips(90, 37, 61, 16)
    labels = torch.tensor([0, 1, 2, 3])
    logits = made(*batch(rows))
    padded = twin(*batch(rows, to=200, padding=999.0))
    torch.testing.assert_close(padded, logits, atol=1e-5, rtol=1e-4)
    for network_, result in ((made, logits), (twin, padded)):
        nn.functional.cross_entropy(result, labels).backward()
        assert network_.training
    torch.testing.assert_close(gradient(twin), gradient(made), atol=1e-5, rtol=1e-3)
    # The statistics that batch normalisation keeps are those of sound alone.
    for one, other in zip(made.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)


@every_variant
def test_a_clip_gives_the_same_in_company_as_alone(name):
    made = network(name).eval()
    rows = clips(90, 37, 61, 15, 3, 1)
    together = made(*batch(rows, padding=999.0))
    alone = torch.cat([made(*batch([row])) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@every_variant
def test_without_a_mask_every_frame_counts(name):
    made = network(name, mask=False).eval()
    rows = clips(90, 37)
    features, lengths = batch(rows)
    assert torch.equal(made(features, lengths), made(features, torch.tensor([90, 90])))
    louder = features.clone()
    louder[1, 60:] += 50
    assert not torch.allclose(made(louder, lengths)[1], made(features, lengths)[1], atol=1e-4)


# Learning


@every_variant
def test_every_parameter_learns(name):
    made = network(name)
    made.standardise.fit(clips(90, 37))
    nn.functional.cross_entropy(made(*batch(clips(90, 37))), torch.tensor([0, 1])).backward()
    silent = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@every_variant
def test_32_rows_can_be_learned_by_heart(name):
    made = network(name)
    rows = clips(*(20 + 2 * n for n in range(32)), seed=3)
    made.standardise.fit(rows)
    features, lengths = batch(rows)
    labels = torch.arange(32) % CLASSES
    optimiser = torch.optim.Adam(made.parameters(), lr=5e-3, betas=(0.9, 0.99))
    learned = False
    for step in range(200):
        loss = nn.functional.cross_entropy(made.train()(features, lengths), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 19:
            learned = torch.equal(made.eval()(features, lengths).argmax(1), labels)
            if learned:
                break
    assert learned


@every_variant
def test_a_network_loaded_gives_the_logits_of_the_one_saved(name, tmp_path):
    made = network(name)
    made.standardise.fit(clips(90, 37))
    made.train()(*batch(clips(90, 37)))  # statistics that are not the initial ones
    save_file(made.state_dict(), tmp_path / "network.safetensors")
    loaded = network(name, seed=1)
    loaded.load_state_dict(load_file(tmp_path / "network.safetensors"))
    rows = batch(clips(80, 33, seed=5))
    assert torch.equal(loaded.eval()(*rows), made.eval()(*rows))


# Variants


def test_fusion_weights_are_a_softmax_that_can_be_read():
    made = network("ILT, trainable sum")
    assert made.fusion_weights() == (0.5, 0.5)
    with torch.no_grad():
        made.fusion.copy_(torch.tensor([math.log(0.65), math.log(0.35)]))
    assert made.fusion_weights() == pytest.approx((0.65, 0.35))
    assert network("ILT, sum").fusion_weights() == (0.3, 0.7)
    assert network("ILT, concatenation").fusion_weights() is None
    assert network("CNN-transformer").fusion_weights() is None


def test_a_trainable_sum_is_the_sum_of_those_weights():
    fixed = network("ILT, sum").eval()
    learned = network("ILT, trainable sum").eval()
    shares = torch.tensor([math.log(0.3), math.log(0.7)])
    learned.load_state_dict(fixed.state_dict() | {"fusion": shares})
    rows = batch(clips(90, 37))
    torch.testing.assert_close(learned(*rows), fixed(*rows))


def test_ilt_with_all_weight_on_the_transformer_is_the_cnn_transformer():
    ilt = network("ILT, sum", weight=0.0).eval()
    plain = network("CNN-transformer").eval()
    plain.load_state_dict(
        {n: t for n, t in ilt.state_dict().items() if not n.startswith(("lstm", "pooling"))}
    )
    rows = batch(clips(90, 37))
    torch.testing.assert_close(ilt(*rows), plain(*rows))


def test_one_way_cats_are_cat_with_the_other_transformer_at_zero():
    cat = network("CAT").eval()
    rows = batch(clips(90, 37))
    total = torch.zeros(2, CLASSES)
    for name, other in (("CAT, CNN to LSTM", "lstm_to_cnn"), ("CAT, LSTM to CNN", "cnn_to_lstm")):
        way = network(name).eval()
        way.load_state_dict({n: t for n, t in cat.state_dict().items() if not n.startswith(other)})
        total += way(*rows) - cat.classify.bias
    torch.testing.assert_close(total + cat.classify.bias, cat(*rows), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "context"), [("CAT, CNN to LSTM", "lstm"), ("CAT, LSTM to CNN", "cnn")]
)
def test_a_way_without_its_attention_hears_its_queries_alone(name, context):
    made, rows = network(name).eval(), batch(clips(90, 37))
    way = made.cnn_to_lstm if context == "lstm" else made.lstm_to_cnn
    intact = made(*rows)
    with torch.no_grad():
        way.layers[0].attention.out_proj.weight.zero_()
    deaf = made(*rows)
    assert not torch.allclose(deaf, intact, atol=1e-4)
    with torch.no_grad():
        for parameter in getattr(made, context).parameters():
            parameter.mul_(3)
    assert torch.equal(made(*rows), deaf)


# Blocks


def test_standardised_training_frames_have_mean_0_and_variance_1():
    block = acoustic.Standardise(40)
    rows = clips(90, 37, 61)
    block.fit(rows)
    features, lengths = batch(rows, padding=999.0)
    result = block(features, lengths)
    valid = result[acoustic.within(lengths, 90)]
    torch.testing.assert_close(valid.mean(0), torch.zeros(40), atol=1e-4, rtol=0)
    torch.testing.assert_close(valid.std(0, correction=0), torch.ones(40), atol=1e-4, rtol=0)
    assert not result[~acoustic.within(lengths, 90)].any()


def test_a_band_that_never_sounds_stays_finite():
    block = acoustic.Standardise(40)
    block.fit([torch.full((5, 40), -100.0)])
    assert block(torch.full((1, 5, 40), -99.0), torch.tensor([5])).isfinite().all()


def test_positions_are_equations_3_and_4():
    encoding = acoustic.positions(6, 8, torch.device("cpu"))
    for position in range(6):
        for i in range(4):
            angle = position / 10_000 ** (2 * i / 8)
            assert encoding[position, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert encoding[position, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_without_positions_a_transformer_does_not_know_the_order():
    torch.manual_seed(0)
    block = acoustic.Transformer(8, SMALL["transformer"]).eval()
    x, lengths = torch.randn(1, 6, 8), torch.tensor([6])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    located = x + acoustic.positions(6, 8, x.device)
    plain, turned = (block(s, None, lengths).mean(1) for s in (x, x[:, order]))
    torch.testing.assert_close(turned, plain)
    relocated = x[:, order] + acoustic.positions(6, 8, x.device)
    aware, moved = (block(s, None, lengths).mean(1) for s in (located, relocated))
    assert not torch.allclose(aware, moved, atol=1e-3)


def test_attention_is_equation_1():
    torch.manual_seed(0)
    settings = changed(SMALL["transformer"], heads=1)
    layer = acoustic.Transformer(8, settings).eval().layers[0]
    queries, context = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    weight, bias = layer.attention.in_proj_weight, layer.attention.in_proj_bias
    q, k, v = (
        x @ weight[i * 8 : i * 8 + 8].T + bias[i * 8 : i * 8 + 8]
        for i, x in enumerate((queries, context, context))
    )
    z = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    x = layer.attended(queries + layer.attention.out_proj(z))
    expected = layer.transformed(x + layer.inner(x))
    hidden = torch.zeros(1, 5, dtype=torch.bool)
    torch.testing.assert_close(layer(queries, context, hidden), expected)


def test_attention_pooling_is_equations_9_and_10():
    torch.manual_seed(0)
    block = acoustic.AttentionPooling(8)
    x = torch.randn(2, 5, 8)
    weights = torch.exp(x[0] @ block.score.weight[0])
    expected = (weights[:, None] * x[0]).sum(0) / weights.sum()
    torch.testing.assert_close(block(x, torch.tensor([5, 5]))[0], expected)
    assert torch.equal(block(x, torch.tensor([5, 1]))[1], x[1, 0])


def test_the_lstm_reads_backwards_from_the_last_valid_step():
    torch.manual_seed(0)
    block = acoustic.BiLstm(8, 3)
    x = torch.randn(1, 5, 8)
    states = block(x, torch.tensor([3]))
    torch.testing.assert_close(states[:, :3], block(x[:, :3], torch.tensor([3])))
    assert not states[:, 3:].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_variant
def test_a_gpu_gives_the_same(name):
    made = network(name).eval()
    features, lengths = batch(clips(90, 37))
    expected = made(features, lengths)
    found = made.cuda()(features.cuda(), lengths.cuda())
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


def alone(cnn, row, length):
    """Run equation 5 on one clip by itself, written out; frames beyond `length` are not there."""
    x = row[None, None, :length]
    for convolution, norm in zip(cnn.convolutions, cnn.norms, strict=True):
        x = convolution(x)
        x = nn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias
        ).relu()
        x = nn.functional.avg_pool2d(x, cnn.pool)
    return x.permute(0, 2, 3, 1).flatten(2)[0]


@pytest.mark.parametrize(
    ("channels", "kernel", "pool"),
    [((4, 6, 8), 3, 2), ((2, 4), 7, 2), ((2, 4), 4, 3), ((4,), 5, 3)],
)
def test_clips_that_share_a_time_axis_do_not_hear_each_other(channels, kernel, pool):
    torch.manual_seed(0)
    settings = changed(SHIPPED_CNN, channels=channels, kernel=kernel, pool=pool, dropout=0.0)
    cnn = acoustic.Cnn(40, settings).eval().double()
    lengths = torch.tensor([50, 17, 31, 9, 48, 49])
    x = torch.randn(6, 50, 40, dtype=torch.float64) * acoustic.within(lengths, 50)[..., None]
    steps, counts = cnn(x, lengths)
    for row, length, own, count in zip(x, lengths, steps, counts, strict=True):
        expected = alone(cnn, row, int(length))
        assert len(expected) == count
        torch.testing.assert_close(own[:count], expected)
        assert not own[count:].any()


def test_an_lstm_in_both_directions_is_torchs_on_packed_rows():
    torch.manual_seed(0)
    ours, packed = acoustic.BiLstm(6, 4), nn.LSTM(6, 4, batch_first=True, bidirectional=True)
    own = ours.onward.state_dict() | {
        f"{name}_reverse": value for name, value in ours.back.state_dict().items()
    }
    packed.load_state_dict(own)
    x, lengths = torch.randn(4, 7, 6), torch.tensor([7, 3, 1, 5])
    rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(packed(rows)[0], batch_first=True)
    torch.testing.assert_close(ours(x, lengths), expected)
