"""The convolution over word vectors."""

import itertools

import pytest
import torch

from llm_emo.baselines import storage, text_cnn
from llm_emo.baselines.settings import TextCnnSettings
from llm_emo.baselines.text_cnn import TextCnn
from llm_emo.errors import ModelError


def settings(**changes):
    fields = {
        "filters": 5, "sizes": (3,), "stride": 1, "pooling": "max", "dropout": 0.0,
        "train_vectors": True,
    }  # fmt: skip
    return TextCnnSettings(**fields | changes)


def network(seed=0, words=40, classes=2, **changes):
    torch.manual_seed(seed)
    return TextCnn(settings(**changes), words=words, dimensions=8, classes=classes)


def texts(count=32, seed=0, words=40, longest=9):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, words, (n,), generator=generator).tolist() for n in lengths]


VARIANTS = [
    {"pooling": pooling, "stride": stride, "sizes": sizes}
    for pooling, stride, sizes in itertools.product(("max", "mean"), (1, 3), ((3,), (7,), (2, 4)))
]


@pytest.mark.parametrize("filters", [1, 100])
@pytest.mark.parametrize("size", [3, 7])
def test_the_parameters_are_those_of_the_formula(filters, size):
    made = network(filters=filters, sizes=(size,))
    words, dimensions = made.embedding.weight.shape
    expected = words * dimensions + filters * (dimensions * size + 1) + 2 * (filters + 1)
    assert sum(p.numel() for p in made.parameters()) == expected


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_text_has_the_same_scores_in_every_company(variant):
    made, rows = network(**variant), texts()
    together = made(text_cnn.pad(rows))
    assert together.shape == (32, 2)
    for row, scores in zip(rows, together, strict=True):
        assert torch.allclose(made(text_cnn.pad([row]))[0], scores, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_word_of_a_text_is_seen(variant):
    """Where the stride is no longer than the filter."""
    made = network(**variant, filters=40)
    if variant["stride"] > max(variant["sizes"]):
        return
    row = [2, 3, 4, 5, 6, 7, 8]
    before = made(text_cnn.pad([row]))
    for place in range(len(row)):
        changed = [*row[:place], 30, *row[place + 1 :]]
        assert not torch.allclose(made(text_cnn.pad([changed])), before, atol=1e-6), place


def test_scores_are_those_of_the_equations_one_window_at_a_time():
    made = network(stride=2, sizes=(2, 3), pooling="mean")
    row = [5, 9, 2, 7, 3]
    vectors = made.embedding.weight[row]
    pooled = []
    for size, convolution in zip((2, 3), made.convolutions, strict=True):
        behind = torch.cat([vectors, torch.zeros(size - 1, 8)])
        windows = [behind[start : start + size].T for start in (0, 2, 4)]
        found = [
            ((convolution.weight * window).sum((1, 2)) + convolution.bias).relu()
            for window in windows
        ]
        pooled.append(torch.stack(found).mean(0))
    expected = made.output.weight @ torch.cat(pooled) + made.output.bias
    assert torch.allclose(made(text_cnn.pad([row]))[0], expected, atol=1e-6)


def test_a_text_without_words_has_finite_scores():
    assert torch.isfinite(network()(text_cnn.pad([[], []]))).all()


def test_padding_never_gets_a_vector():
    made = network()
    made.start_from(torch.ones(40, 8))
    optimizer = torch.optim.SGD(made.parameters(), 0.1)
    made(text_cnn.pad([[3], [4, 5, 6, 7]])).square().sum().backward()
    optimizer.step()
    assert not made.embedding.weight[0].any()
    assert (made.embedding.weight[3] != 1).any()


def test_frozen_vectors_stay():
    made = network(train_vectors=False)
    before = made.embedding.weight.clone()
    optimizer = torch.optim.Adam(made.parameters(), 0.1)
    made(text_cnn.pad(texts())).square().sum().backward()
    optimizer.step()
    assert torch.equal(made.embedding.weight, before)


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_it_overfits_32_rows(pooling):
    made, ids = network(pooling=pooling, filters=32), text_cnn.pad(texts(longest=6))
    labels = torch.tensor([number % 2 for number in range(32)])
    # Texts of no words cannot be told apart.
    kept = (ids != 0).any(1)
    optimizer = torch.optim.Adam(made.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(made(ids[kept]), labels[kept]).backward()
        optimizer.step()
    assert (made(ids[kept]).argmax(1) == labels[kept]).all()


def test_every_parameter_gets_a_gradient():
    made = network(sizes=(2, 3), dropout=0.2)
    torch.nn.functional.cross_entropy(made(text_cnn.pad(texts())), torch.arange(32) % 2).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_saved_and_loaded_it_gives_the_same_bits(tmp_path):
    made, ids = network(dropout=0.5).eval(), text_cnn.pad(texts())
    storage.save_weights(tmp_path / "model.safetensors", made)
    again = network(seed=9, dropout=0.5).eval()
    assert not torch.equal(again(ids), made(ids))
    storage.load_weights(tmp_path / "model.safetensors", again)
    assert torch.equal(again(ids), made(ids))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_weights_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    storage.save_weights(path, network())
    with pytest.raises(ModelError, match=r"convolutions.0.weight has shape .*, expected"):
        storage.load_weights(path, network(filters=6))
    with pytest.raises(ModelError, match=r"missing convolutions.1"):
        storage.load_weights(path, network(sizes=(3, 4)))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="cannot be read"):
        storage.load_weights(path, network())
    with pytest.raises(ModelError, match="no such file"):
        storage.load_weights(tmp_path / "absent", network())


@pytest.mark.parametrize(
    "wrong", [{"filters": 0}, {"sizes": ()}, {"sizes": (0,)}, {"stride": 0}, {"dropout": 1.0}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        settings(**wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_scores():
    made, ids = network(sizes=(2, 3)), text_cnn.pad(texts())
    expected = made(ids)
    assert torch.allclose(made.cuda()(ids.cuda()).cpu(), expected, atol=1e-4)
