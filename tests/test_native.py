"""The compiled loops against float32, and what happens where they cannot be compiled."""

import contextlib
import os
import subprocess

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llm_emo import errors, fetch, lean, native, native_lora, projections

SHAPES = [(1, 1), (3, 7), (5, 24), (70, 576), (2, 3, 24)]
"""The largest is shared by threads."""
HALF = {torch.bfloat16: 2**-8, torch.float32: 2**-20}
"""Half a unit in the last place, as a share; of float32, whose sums have another order, eight."""


@pytest.fixture(params=HALF, ids=["bfloat16", "float32"])
def dtype(request):
    return request.param


@pytest.fixture
def library():
    try:
        native._tools()
    except OSError as error:
        pytest.skip(f"nothing can be compiled here: {error}")
    for dtype in HALF:
        assert native.library(dtype) is not None, f"the sources do not compile for {dtype}"


@pytest.fixture
def no_library(monkeypatch):
    """What runs inside has torch's operations only."""

    @contextlib.contextmanager
    def without():
        with monkeypatch.context() as inside:
            inside.setattr(native, "library", lambda dtype: None)
            yield

    return without


@pytest.fixture
def fresh():
    """Nothing is known of a library, before and after."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def drawn(*shape, scale=1.0, dtype=torch.bfloat16):
    return (torch.randn(shape) * scale).to(dtype)


def close(found, exact, atol=1e-6):
    """Hold what is rounded once to half a unit; float32's own sums add a little."""
    torch.testing.assert_close(
        found.double(), exact.double(), rtol=1.02 * HALF[found.dtype], atol=atol
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_norm_is_float32_s_rounded_once(library, dtype, shape, no_library):
    torch.manual_seed(0)
    x, weight = drawn(*shape, scale=3, dtype=dtype), drawn(shape[-1], dtype=dtype)
    y, scale = native.rms_norm(x, weight, 0.5)
    with no_library():
        exact, exact_scale = lean.normed(x.float(), weight.float(), 0.5)
    assert (y.dtype, scale.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(scale, exact_scale)
    close(y, exact)


@pytest.mark.parametrize("further", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_norm_s_gradient_is_float32_s_rounded_once(library, dtype, shape, further, no_library):
    torch.manual_seed(0)
    x, grad = (drawn(*shape, scale=scale, dtype=dtype) for scale in (3, 1))
    weight = drawn(shape[-1], dtype=dtype)
    added = drawn(*shape, dtype=dtype) if further else None
    _, scale = native.rms_norm(x, weight, 1e-5)
    found = native.rms_norm_backward(grad, x, weight, scale, added)
    with no_library():
        exact = lean.normed_backward(
            grad.float(), x.float(), weight.float(), scale,
            added if added is None else added.float(),
        )  # fmt: skip
    close(found, exact, atol=1e-5)


def test_a_norm_takes_what_is_not_contiguous(library):
    torch.manual_seed(0)
    x, weight = drawn(24, 6).T, drawn(24)
    grad = torch.ones(1, 1).bfloat16().expand(6, 24)
    y, scale = native.rms_norm(x, weight, 1e-5)
    assert torch.equal(y, native.rms_norm(x.contiguous(), weight, 1e-5)[0])
    found = native.rms_norm_backward(grad, x, weight, scale, grad)
    one = native.rms_norm_backward(
        grad.contiguous(), x.contiguous(), weight, scale, grad.contiguous()
    )
    assert torch.equal(found, one)


@pytest.mark.parametrize("rows", [1, 9, 200])
def test_a_gate_and_its_gradient_are_float32_s_rounded_once(library, dtype, rows):
    torch.manual_seed(0)
    opening, grad = drawn(rows, 2 * 96, scale=4, dtype=dtype), drawn(rows, 96, dtype=dtype)
    low = opening.double().requires_grad_()
    gate, up = low.chunk(2, -1)
    exact = nn.functional.silu(gate) * up
    close(native.gated(opening), exact.detach())
    exact.backward(grad.double())
    close(native.gated_backward(grad, opening), low.grad)


def test_a_gate_takes_every_number(library):
    """Far outside of exp's reach, and what is none."""
    numbers = [-torch.inf, -3e38, -200, -87.5, -1e-30, 0, 1e-30, 87.5, 200, 3e38, torch.nan]
    gate = torch.tensor(numbers).bfloat16()
    opening = torch.cat([gate, torch.ones_like(gate)])[None]
    found = native.gated(opening)[0].float()
    exact = gate.float() * torch.sigmoid(gate.float())
    assert exact[0].isnan()  # minus infinity times 0
    torch.testing.assert_close(
        found, exact, rtol=1.02 * HALF[torch.bfloat16], atol=1e-35, equal_nan=True
    )


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("rows", "heads", "size"), [(1, 1, 2), (7, 3, 16), (90, 12, 64)])
def test_heads_are_turned_in_place_within_wider_rows(library, dtype, rows, heads, size, back):
    torch.manual_seed(0)
    whole = drawn(rows, (heads + 2) * size, dtype=dtype)
    angles = torch.randn(rows, 1, 2 * size)
    cos, sin = (part[..., ::2] for part in (angles.cos().to(dtype), angles.sin().to(dtype)))
    before, part = whole.clone(), whole[:, : heads * size]
    exact = part.double()
    lean.rotate(exact, cos.double(), sin.double(), back=back)
    lean.rotate(part, cos, sin, back=back)
    close(part, exact)
    assert torch.equal(whole[:, heads * size :], before[:, heads * size :])


def test_every_finite_number_is_kept_and_halves_go_to_even(library):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = bits[bits.isfinite()][:, None].repeat(1, 2).contiguous()
    turned, one = finite.clone(), torch.ones(len(finite), 1, 2).bfloat16()
    native.rotate(turned, one, 0 * one, 1.0)
    assert torch.equal(turned, finite)
    # 1 + 2^-8 and 1 + 3 * 2^-8 lie halfway between two of bfloat16's numbers.
    sums = torch.tensor([[1.0, 2**-8], [1 + 2**-7, 2**-8]]).bfloat16()
    native.rotate(sums, one[:2], -one[:2], 1.0)  # the first and the second
    assert sums[:, 0].tolist() == [1.0, 1 + 2**-6]


@pytest.mark.parametrize("words", [1, 10, 5000])
def test_log_probabilities_are_float32_s(library, dtype, words):
    torch.manual_seed(0)
    logits = drawn(8, words + 3, scale=20, dtype=dtype)[
        :, :words
    ]  # as of a vocabulary that was padded
    rows, picked = torch.tensor([0, 7, 7]), torch.tensor([words - 1, 0, words // 2])
    found = lean.log_probabilities(logits, rows, picked)
    exact = logits.float().log_softmax(-1)[rows, picked]
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("certain", [False, True])
def test_gradients_of_log_probabilities_are_float32_s_rounded_once(library, dtype, certain):
    torch.manual_seed(0)
    logits = drawn(7, 40, scale=3, dtype=dtype)
    # A word twice, two words of one row, and rows without any.
    rows, picked = torch.tensor([0, 6, 6, 6, 3]), torch.tensor([39, 0, 0, 17, 5])
    if certain:
        logits[3, 5], logits[0, 39] = 12.0, 14.0
    grad = torch.tensor([-1.0, -0.25, -0.5, 2.0, -1.0])
    low = logits.clone().requires_grad_()
    exact = logits.float().requires_grad_()
    (lean.log_probabilities(low, rows, picked) * grad).sum().backward()
    (exact.log_softmax(-1)[rows, picked] * grad).sum().backward()
    # What two terms leave of each other is float32's rounding of them.
    close(low.grad, exact.grad, atol=2e-7 if dtype == torch.bfloat16 else 1e-6)
    assert not low.grad[[1, 2, 4, 5]].any()


def test_without_a_library_torch_does_the_same(library, no_library):
    torch.manual_seed(0)
    x, weight, opening = drawn(5, 24), drawn(24), drawn(5, 48)
    cos, sin = drawn(5, 1, 8), drawn(5, 1, 8)

    def everything():
        turned = x.clone()
        lean.rotate(turned, cos, sin)
        y, scale = lean.normed(x, weight, 1e-5)
        return [
            y, lean.normed_backward(y, x, weight, scale, x), lean.gated(opening),
            lean.gated_backward(x.clone(), opening), turned,
        ]  # fmt: skip

    found = everything()
    with no_library():
        usual = everything()
    for one, other in zip(found, usual, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.float(), other.float(), rtol=2**-6, atol=2e-2)


def test_mixed_numbers_and_other_devices_are_not_served(library, dtype):
    assert native.serves(drawn(2, 2, dtype=dtype))
    assert not native.serves(drawn(2, 2), torch.zeros(2))
    assert not native.serves(drawn(2, 2).double())
    assert not native.serves(drawn(2, 2, dtype=dtype).to("meta"))
    x, weight = drawn(3, 4), drawn(4)
    y, scale = lean.normed(x, weight, 1e-5)
    added = torch.randn(3, 4)
    alone = lean.normed_backward(y, x, weight, scale)
    torch.testing.assert_close(
        lean.normed_backward(y, x, weight, scale, added).float(),
        alone.float() + added, rtol=2**-6, atol=2e-2,
    )  # fmt: skip


# --- LoRA's products ----------------------------------------------------------------------------


SIZES = [((32,), (8,)), ((64, 32, 96), (8, 8, 8)), ((32, 64, 32), (16, 0, 8))]
"""The outputs of projections, and the ranks of their adapters."""


@pytest.mark.parametrize("nodes", [0, 1, 8, 9, 150])
@pytest.mark.parametrize(("sizes", "ranks"), SIZES)
def test_lora_and_its_gradients_are_those_of_products(library, dtype, nodes, sizes, ranks):
    torch.manual_seed(0)
    x, grad = drawn(nodes, 64, dtype=dtype), drawn(nodes, sum(sizes), dtype=dtype)
    out, dx = drawn(nodes, sum(sizes), dtype=dtype), drawn(nodes, 64, dtype=dtype)
    adapters = [
        torch.randn(shape)
        for rank, size in zip(ranks, sizes, strict=True)
        if rank
        for shape in ((rank, 64), (size, rank))
    ]
    exact_out, exact_dx = out.double(), dx.double()
    low = native_lora.lora(x, out, sizes, ranks, adapters, 0.25)
    found = native_lora.lora_backward(grad, x, low, sizes, ranks, adapters, 0.25, dx)

    # What is rounded on the way: A, B with its scale, x A^T and its gradient.
    rest, start, rank_start, expected = iter(adapters), 0, 0, []
    for rank, size in zip(ranks, sizes, strict=True):
        if rank:
            a, b = next(rest).to(dtype).double(), (next(rest) * 0.25).to(dtype).double()
            part, own = slice(start, start + size), slice(rank_start, rank_start + rank)
            close(low[:, own], x.double() @ a.T, atol=1e-4)
            rounded = low[:, own].double()
            exact_out[:, part] += rounded @ b.T
            dlow = (grad[:, part].double() @ b).to(dtype).double()
            exact_dx += dlow @ a
            expected += [dlow.T @ x.double(), 0.25 * grad[:, part].double().T @ rounded]
            rank_start += rank
        start += size
    close(out, exact_out, atol=1e-4)
    close(dx, exact_dx, atol=1e-1 if dtype == torch.bfloat16 else 1e-3)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        # A number of x A^T's gradient may be rounded the other way.
        assert (one - other).norm() <= HALF[dtype] * other.norm()


def test_nobody_may_ask_for_the_gradient_of_lora_s_input(library):
    torch.manual_seed(0)
    x, grad, adapters = drawn(5, 32), drawn(5, 32), [torch.randn(8, 32), torch.randn(32, 8)]
    low = native_lora.lora(x, drawn(5, 32), (32,), (8,), adapters, 1.0)
    asked = native_lora.lora_backward(grad, x, low, (32,), (8,), adapters, 1.0, drawn(5, 32))
    for one, other in zip(
        asked, native_lora.lora_backward(grad, x, low, (32,), (8,), adapters, 1.0, None),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(one, other)


def test_lora_takes_what_is_not_contiguous(library, dtype):
    torch.manual_seed(0)
    wide, out, dx = drawn(9, 128, dtype=dtype), drawn(9, 32, dtype=dtype), drawn(9, 64, dtype=dtype)
    x, grad = wide[:, ::2], drawn(32, 9, dtype=dtype).T
    adapters = [torch.randn(64, 8).T, torch.randn(8, 32).T]

    def everything(x, grad, adapters):
        mine, own = out.clone(), dx.clone()
        low = native_lora.lora(x, mine, (32,), (8,), adapters, 0.5)
        found = native_lora.lora_backward(grad, x, low, (32,), (8,), adapters, 0.5, own)
        return [mine, own, low, *found]

    plain = [part.contiguous() for part in (x, grad, *adapters)]
    for one, other in zip(
        everything(x, grad, adapters), everything(plain[0], plain[1], plain[2:]), strict=True
    ):
        assert torch.equal(one, other)


def test_narrow_vectors_multiply_in_bfloat16_only(library, monkeypatch):
    class Narrow:
        @staticmethod
        def has_wide_vectors():
            return 0

    assert native.library(torch.float32).has_wide_vectors() in (0, 1)
    monkeypatch.setattr(native, "library", lambda dtype: Narrow)
    assert native.multiplies(torch.bfloat16)
    assert not native.multiplies(torch.float32)


@pytest.mark.parametrize(
    ("ranks", "widths", "served"),
    [((8, 16), (32, 64), True), ((8, 4), (32, 64), False), ((8, 0), (32, 48), False)],
)
def test_ranks_and_widths_that_fill_no_vector_are_left_to_torch(ranks, widths, served):
    assert native_lora.are_whole(ranks, widths) == served


# --- where there is none ------------------------------------------------------------------------


def test_it_is_compiled_once_and_kept(library, fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path))
    assert native.library(torch.bfloat16) is not None
    (kept,) = tmp_path.glob("*/*")
    assert kept.suffix == ".so"

    def never(*args, **kwargs):
        raise AssertionError("compiled a second time")

    monkeypatch.setattr(subprocess, "run", never)
    native.library.cache_clear()
    assert native.library(torch.bfloat16) is not None


def test_another_processor_gets_its_own(library, fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path))
    compiler, openmp, processor = native._tools()
    first = native._compiled(native.OPTIONS, compiler, openmp, processor)
    assert native._compiled(native.OPTIONS, compiler, openmp, processor + "more") != first


def test_a_damaged_one_is_compiled_anew(library, fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path))
    path = native._compiled(native.OPTIONS, *native._tools())
    path.write_text("no library", "ascii")
    assert native.library(torch.bfloat16) is None
    native.library.cache_clear()
    assert native.library(torch.bfloat16) is not None


@pytest.mark.parametrize(
    "lacking", ["asked", "compiler", "openmp", "compilation", "function", "cache", "private"]
)
def test_what_cannot_be_compiled_is_left_to_torch(fresh, monkeypatch, tmp_path, lacking):
    cache = tmp_path / "cache"
    monkeypatch.setenv("LLM_EMO_CACHE", str(cache))
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 1\n", "ascii")
    compiler.chmod(0o755)
    tools = (str(compiler), "libgomp.so", "a processor")
    match lacking:
        case "asked":
            monkeypatch.setenv("LLM_EMO_NATIVE", "0")
        case "compiler":
            monkeypatch.setenv("PATH", str(tmp_path / "empty"))
        case "openmp":
            monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
        case "compilation":
            monkeypatch.setattr(native, "_tools", lambda: tools)
        case "cache":
            cache.write_text("a file", "ascii")
            with pytest.raises(errors.JobFailed):
                fetch.cache_dir()
        case "function":
            monkeypatch.setitem(native._ARGUMENTS, "no_function", [])
        case "private":  # others could put something into the folder
            (cache / f"native-{os.getuid()}").mkdir(parents=True)
            (cache / f"native-{os.getuid()}").chmod(0o777)
    assert native.library(torch.bfloat16) is None
    assert not native.serves(drawn(2, 2))
    if cache.is_dir() and lacking != "function":
        assert not list(cache.glob("*/*"))


def test_in_float32_a_norm_is_transformers_to_the_bit(library):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(24, 1e-5)
    norm.weight.data.normal_()
    x = torch.randn(7, 24)
    assert torch.equal(lean.normed(x, norm.weight.detach(), 1e-5)[0], norm(x).detach())


def test_lora_s_loops_never_meet_an_output_of_another_dtype(library, monkeypatch):
    """As under autocast, where torch's product has bfloat16 for float32."""
    group = projections.Group(
        torch.randn(32, 32), None, (32,), (8,), 1.0, torch.float32, packed=None, compiled=True
    )
    monkeypatch.setattr(projections, "product", lambda x, group: x.bfloat16())
    monkeypatch.setattr(native_lora, "lora", lambda *given: pytest.fail("it would write too much"))
    adapters = [torch.randn(8, 32), torch.randn(32, 8)]
    with pytest.raises(RuntimeError):
        projections.project(torch.randn(5, 32), group, adapters, learning=True)
