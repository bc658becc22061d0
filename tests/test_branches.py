"""Attention over a trie in pieces, against the dense mask."""

import pickle

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llm_emo import attention, branches, native_attention, training
from llm_emo.branches import Branches, attend, cheapest
from llm_emo.trie import TokenTrie, TrieDecoder, begin, node_logits

GROUPS, FOLD, WIDTH = 2, 3, 4

ids = st.lists(st.integers(0, 2), min_size=1, max_size=9)
tries = st.lists(ids, min_size=1, max_size=8).map(TokenTrie.build)


COPIED = 2.0
"""Of the tiny models: keys of eight numbers, which two heads share."""


def pieces(trie: TokenTrie, width: int) -> Branches:
    """Cut at a width of the test's choice, whether or not it pays."""
    return Branches.cut(trie.exit, trie.depth, width, width // 2 + 1)


def drawn(trie: TokenTrie, prefix: int, seed: int = 0, width: int = WIDTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, len(trie), width) for heads in (GROUPS * FOLD, GROUPS, GROUPS)]
    shapes.append((prefix, 2, GROUPS, width))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def dense(query, key, value, prefix, trie):
    key, value = (
        torch.cat([own.transpose(0, 1)[None], part], 2).repeat_interleave(FOLD, 1)
        for own, part in zip(prefix.unbind(1), (key, value), strict=True)
    )
    mask = nn.functional.pad(trie.allowed(), (len(prefix), 0), value=True)
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.4)
    return out.transpose(1, 2)


@pytest.mark.parametrize("size", [WIDTH, 32])  # torch's operations, and compiled loops
@settings(deadline=None)
@given(trie=tries, width=st.integers(1, 12), prefix=st.integers(0, 3))
def test_every_cut_gives_the_dense_result_and_its_gradients(size, trie, width, prefix):
    cut = pieces(trie, width)
    inputs = drawn(trie, prefix, width=size)
    *parts, own = inputs
    both = [part.detach()[0].transpose(0, 1).flatten(1) for part in parts[:2]]
    if size == 32 and not native_attention.attends(*both, own):
        pytest.skip("nothing can be compiled here, or nothing for float32")
    found = attend(*parts, cut, own if prefix else None, 0.4)
    wide = [part.detach().double().requires_grad_() for part in inputs]
    expected = dense(*wide, trie)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    wanted = slice(4 if prefix else 3)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), inputs[wanted]),
        torch.autograd.grad((expected * weights).sum(), wide[wanted]),
        strict=True,
    ):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(usual)


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("width", [10, 25])
@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_loops_round_no_more_than_torch_s_operations(
    dtype, size, width, prefix, threads, monkeypatch
):
    trie = batch(rows=30, shared=70)
    cut = pieces(trie, width)
    assert cut.bias(prefix, dtype).shape[-1] > 64
    assert len(cut.lengths) > 3
    inputs = [part.detach().to(dtype) for part in drawn(trie, prefix, width=size)]
    if not native_attention.attends(inputs[0], inputs[1], inputs[3]):
        pytest.skip("nothing can be compiled here, or nothing for float32")
    weights = torch.randn(1, len(trie), GROUPS * FOLD, size, dtype=dtype)

    def everything(given, attending):
        given = [part.clone().requires_grad_() for part in given]
        out = attending(*given)
        found = torch.autograd.grad((out * weights.to(out.dtype)).sum(), given)
        return [part.double() for part in (out.detach(), *found) if part.numel()]

    def ours(query, key, value, own):
        return attend(query, key, value, cut, own, 0.4)

    exact = everything([part.double() for part in inputs], lambda *given: dense(*given, trie))
    found = everything(inputs, ours)
    monkeypatch.setattr(native_attention, "attends", lambda *given: False)
    usual = everything(inputs, ours)
    assert len(found) == (5 if prefix else 4)
    for one, other, right in zip(found, usual, exact, strict=True):
        assert (one - right).norm() <= max(1.1 * (other - right).norm(), 1e-6 * right.norm())


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("size", [WIDTH, 32])
def test_what_nobody_learns_from_is_the_same(size, prefix):
    trie = batch(rows=30, shared=70)
    cut = pieces(trie, 25)
    *parts, own = drawn(trie, prefix, width=size)
    with torch.no_grad():
        found = attend(*parts, cut, own, 0.4)
    assert torch.equal(found, attend(*parts, cut, own, 0.4))


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("size", [WIDTH, 32])
def test_without_numbers_as_much_is_kept(size, prefix):
    """Plans run passes without numbers, and count what they keep."""
    trie = batch(rows=30, shared=70)
    cut = pieces(trie, 25)
    parts = [part.detach()[0].transpose(0, 1).flatten(1) for part in drawn(trie, 0, width=size)[:3]]
    before = torch.zeros(2 * GROUPS, prefix, size)
    sizes = []
    for device in ("cpu", "meta"):
        nodes, both, front = (
            part.to(device) for part in (parts[0], torch.cat(parts[1:], 1), before)
        )
        out, saved = branches.forward(nodes, both, front, cut, 0.4, learning=True)
        dnodes, dbefore = branches.backward(out, saved, cut, 0.4)
        sizes.append([part.shape for part in (out, *saved, dnodes, dbefore)])
    assert sizes[0] == sizes[1]


def test_pieces_can_be_pickled_after_a_pass():
    trie = batch()
    cut = pieces(trie, 10)
    *parts, own = (part.detach() for part in drawn(trie, 2, width=32))
    found = attend(*parts, cut, own, 0.4)
    again = pickle.loads(pickle.dumps(cut))
    assert torch.equal(attend(*parts, again, own, 0.4), found)


def test_queries_in_no_order_of_memory_are_left_to_torch():
    trie = batch()
    cut = pieces(trie, 10)
    query, key, value, own = (part.detach() for part in drawn(trie, 2, width=32))
    found = attend(query, key, value, cut, own, 0.4)
    strided = query.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(attend(strided, key, value, cut, own, 0.4), found)


@settings(deadline=None)
@given(trie=tries, width=st.integers(1, 12), prefix=st.integers(0, 3))
def test_a_cut_holds_every_node_once_and_every_visible_pair_once(trie, width, prefix):
    cut = pieces(trie, width)
    assert cut.queries.flatten()[cut.place].tolist() == list(range(len(trie)))
    assert int(cut.widths.max()) <= width
    columns = cut.columns(prefix)[cut.place // cut.queries.shape[1]]
    seen = cut.bias(prefix, torch.float32)[cut.place, 0] == 0
    assert seen[:, :prefix].all()
    found = torch.zeros(len(trie), len(trie), dtype=torch.int64)
    for node in range(len(trie)):
        keys = columns[node][seen[node, prefix:]]
        assert (keys >= 0).all()
        found[node].index_add_(0, keys, torch.ones_like(keys))
    assert torch.equal(found, trie.allowed().long())


def batch(rows: int = 8, shared: int = 12) -> TokenTrie:
    return TokenTrie.build([r.prompt + r.answer for r in tiny.encoded(rows, shared=shared)])


@pytest.mark.parametrize("front", [0, 30])
@pytest.mark.parametrize("copied", [0.0, 6.5, 40.0])
def test_of_all_cuts_into_rows_filled_up_the_cheapest_is_taken(front, copied):
    trie = batch(60)
    best = cheapest(trie.exit, trie.depth, front=front, copied=copied)
    assert best is not None
    every = [
        Branches.cut(trie.exit, trie.depth, width, width).cost(front, copied)
        for width in branches.WIDTHS
    ]
    assert len(set(every)) > 1
    assert best.cost(front, copied) == min(every)
    assert min(every) < branches.SHARE * len(trie) * (front + len(trie))


def test_copies_ask_for_wide_rows():
    # A long text and many that end one token behind it: narrow rows would copy it every time.
    trie = TokenTrie.build([list(range(5, 45)), *([*range(5, 45), 50 + row] for row in range(400))])
    free = cheapest(trie.exit, trie.depth)
    dear = cheapest(trie.exit, trie.depth, copied=84.0)
    assert free is not None
    assert dear is not None
    assert len(dear.lengths) < len(free.lengths) / 2


def test_a_single_sequence_is_left_whole_but_by_compiled_loops():
    trie = TokenTrie.build([list(range(130))])
    assert cheapest(trie.exit, trie.depth) is None
    cut = cheapest(trie.exit, trie.depth, copied=None)
    assert cut is not None
    assert cut.starts.tolist() == [0, 25, 50, 75, 100, 130]


def test_rows_begin_where_paths_are_short():
    texts = [[*range(6), *range(50 * row, 50 * row + 20)] for row in range(1, 9)]
    cut = pieces(TokenTrie.build(texts), branches.WIDTH)
    assert cut.lengths.tolist() == [0, *[6] * (len(cut.lengths) - 1)]
    assert cut.starts.tolist() == [0, 46, 86, 126, 166]


def test_compiled_loops_pay_for_what_a_row_sees_and_no_more():
    trie = batch(60)
    cut = pieces(trie, branches.WIDTH)
    columns = 7 + cut.lengths + cut.widths
    assert cut.cost(7, None) == int((cut.widths * columns).sum())
    assert cut.cost(7, 0.0) == len(columns) * int(cut.widths.max()) * int(columns.max())


# --- in a model -------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """How often attention was computed in pieces."""
    calls = []

    forward = branches.forward

    def counting(*arguments, **keywords):
        calls.append(1)
        return forward(*arguments, **keywords)

    monkeypatch.setattr(branches, "forward", counting)
    return calls


def ours(architecture, method):
    made = tiny.adapted(architecture, method)
    inner = made.base if method == "p_tuning_v2" else made.get_base_model()
    inner.set_attn_implementation(attention.NAME)
    return made


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "glm"])
@pytest.mark.parametrize("method", tiny.METHODS)
def test_gradients_in_pieces_are_those_of_the_dense_mask(
    architecture, method, counted, monkeypatch
):
    made, rows = ours(architecture, method), tiny.encoded(9, shared=9)

    def backward():
        made.zero_grad()
        loss = training.answer_loss(made, training.collate(rows))
        loss.backward()
        return loss.detach(), tiny.gradients(made)

    loss, gradients = backward()
    assert len(counted) == 2  # one a layer
    monkeypatch.setattr(branches, "SHARE", 0.0)
    dense_loss, expected = backward()
    assert len(counted) == 2
    torch.testing.assert_close(loss, dense_loss)
    assert tiny.distance(gradients, expected) < 1e-5


def test_generation_fills_its_cache_in_pieces(counted, monkeypatch):
    made = ours("glm", "lora")
    with torch.inference_mode():
        found = TrieDecoder(made, batch()).logits
        assert counted
        monkeypatch.setattr(branches, "SHARE", 0.0)
        torch.testing.assert_close(found, TrieDecoder(made, batch()).logits)


def test_a_window_that_binds_keeps_the_dense_mask(counted):
    made, trie = ours("gemma3", "lora"), batch()
    assert int(trie.depth.max()) >= tiny.WINDOW
    node_logits(made, trie, trie.last)
    assert not counted


def test_dropout_inside_attention_is_left_to_sdpa(counted):
    made, trie = ours("llama", "lora"), batch()
    made.get_base_model().config.attention_dropout = 0.1
    with torch.no_grad():
        node_logits(made.train(), trie, trie.last)
        assert not counted
        node_logits(made.eval(), trie, trie.last)
    assert counted


def test_scores_that_would_be_kept_for_the_backward_pass_have_a_limit(counted, monkeypatch):
    made, trie = ours("llama", "lora"), batch()
    monkeypatch.setattr(attention, "KEPT_SCORES", 10)
    node_logits(made, trie, trie.last)
    assert not counted
    with torch.no_grad():
        node_logits(made, trie, trie.last)
    assert counted


@pytest.mark.parametrize("method", tiny.METHODS)
def test_the_limit_counts_the_columns_of_prefix_and_beginning(method, counted, monkeypatch):
    made, rows = ours("llama", method), [row.prompt for row in tiny.encoded(9, shared=9)]
    trie = TokenTrie.build([row[4:] for row in rows])
    before = 4 + (made.prefix_length if method == "p_tuning_v2" else 0)
    cut = cheapest(trie.exit, trie.depth, front=before, copied=COPIED)
    assert cut is not None
    with torch.no_grad():
        front = begin(made, rows[0][:4])
        for spare in (0, -1):
            counted.clear()
            limit = cut.cost(before, COPIED) + spare
            monkeypatch.setattr(attention, "PASSING_SCORES", limit)
            node_logits(made, trie, trie.last, front)
            assert bool(counted) == (spare == 0)


def test_another_attention_never_meets_the_pieces(counted):
    made, trie = tiny.adapted("llama", "lora"), batch()
    assert made.get_base_model().config._attn_implementation == "sdpa"
    with torch.no_grad():
        node_logits(made, trie, trie.last)
    assert not counted


@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_beginning_computed_before_is_seen_by_every_piece(method, counted):
    made = ours("glm", method)
    rows = [row.prompt for row in tiny.encoded(9, shared=9)]
    whole, rest = TokenTrie.build(rows), TokenTrie.build([row[4:] for row in rows])
    with torch.no_grad():
        expected = node_logits(made, whole, whole.last)
        front = begin(made, rows[0][:4])
        assert front is not None
        counted.clear()
        found = node_logits(made, rest, rest.last, front)
    assert counted
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
