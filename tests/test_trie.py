from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_emo import attention, branches
from llm_emo.errors import ModelError
from llm_emo.trie import TokenTrie, TrieDecoder, masks_for, node_logits, verify

# Three symbols, so that random sequences share beginnings, repeat, and contain one another.
few = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12)
# Ids of the tiny models. Longer than Gemma-3's sliding window of six.
ids = st.lists(
    st.lists(st.sampled_from([3, 50, 200]), min_size=1, max_size=14), min_size=1, max_size=5
)
some = settings(max_examples=15, deadline=None)

architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
methods = pytest.mark.parametrize("method", tiny.METHODS)


def prefixes(sequences):
    """All distinct non-empty beginnings, in depth-first order: the naive trie."""
    found = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    return sorted(found)


# --- the data structure ------------------------------------------------------------------------


@given(few)
@settings(max_examples=200, deadline=None)
def test_a_trie_has_one_node_for_every_distinct_beginning(sequences):
    trie, naive = TokenTrie.build(sequences), prefixes(sequences)
    assert len(trie) == len(naive)
    assert trie.tokens.tolist() == [path[-1] for path in naive]
    assert trie.depth.tolist() == [len(path) - 1 for path in naive]
    assert trie.saved == sum(map(len, sequences)) - len(naive)


@given(few)
@settings(max_examples=200, deadline=None)
def test_every_sequence_can_be_read_back_from_its_nodes(sequences):
    trie, naive = TokenTrie.build(sequences), prefixes(sequences)
    assert trie.nodes.shape == (len(sequences), max(map(len, sequences)))
    assert trie.lengths.tolist() == [len(s) for s in sequences]
    for row, sequence in enumerate(sequences):
        nodes = trie.nodes[row].tolist()
        path = nodes[: len(sequence)]
        assert [naive[node] for node in path] == [
            tuple(sequence[: i + 1]) for i in range(len(sequence))
        ]
        assert set(nodes[len(sequence) :]) <= {-1}
        assert trie.last[row] == path[-1]


@given(few)
@settings(max_examples=200, deadline=None)
def test_a_node_sees_its_ancestors_and_itself_and_nothing_else(sequences):
    trie, naive = TokenTrie.build(sequences), prefixes(sequences)
    sees = [[query[: len(key)] == key for key in naive] for query in naive]
    assert trie.allowed().tolist() == sees
    # exit: the first node behind the subtree
    for node, path in enumerate(naive):
        below = [other for other, p in enumerate(naive) if p[: len(path)] == path]
        assert below == list(range(node, int(trie.exit[node])))


@given(few, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_order_of_rows_changes_nothing_but_the_order_of_rows(sequences, random):
    order = list(range(len(sequences)))
    random.shuffle(order)
    trie = TokenTrie.build(sequences)
    shuffled = TokenTrie.build([sequences[row] for row in order])
    assert torch.equal(shuffled.tokens, trie.tokens)
    assert torch.equal(shuffled.exit, trie.exit)
    assert torch.equal(shuffled.nodes, trie.nodes[order])


def test_equal_sequences_share_all_their_nodes():
    trie = TokenTrie.build([(4, 9, 4)] * 5)
    assert len(trie) == 3
    assert trie.saved == 12
    assert trie.nodes.tolist() == [[0, 1, 2]] * 5


def test_a_sequence_may_be_a_beginning_of_another_and_have_one_token():
    trie = TokenTrie.build([(7, 8), (7,), (7, 8, 9), (6,)])
    assert trie.tokens.tolist() == [6, 7, 8, 9]
    assert trie.last.tolist() == [2, 1, 3, 0]


@pytest.mark.parametrize("sequences", [[], [(1, 2), ()], [()]])
def test_no_sequence_and_an_empty_one_are_errors(sequences):
    with pytest.raises(ValueError, match="at least one"):
        TokenTrie.build(sequences)


# --- exactness ---------------------------------------------------------------------------------


@architectures
@given(sequences=ids)
@some
def test_every_token_has_the_logits_that_it_has_alone(architecture, sequences):
    model = tiny.model(architecture)
    trie = TokenTrie.build(sequences)
    with torch.no_grad():
        together = node_logits(model, trie, torch.arange(len(trie)))
        for row, sequence in enumerate(sequences):
            got = together[trie.nodes[row, : len(sequence)]]
            assert tiny.distance(got, tiny.alone(model, sequence)) < 1e-5


@architectures
@methods
@given(sequences=ids)
@settings(max_examples=8, deadline=None)
def test_an_adapted_model_too_gives_every_token_the_logits_that_it_has_alone(
    architecture, method, sequences
):
    model = tiny.adapted(architecture, method)
    trie = TokenTrie.build(sequences)
    with torch.no_grad():
        together = node_logits(model, trie, torch.arange(len(trie)))
        for row, sequence in enumerate(sequences):
            got = together[trie.nodes[row, : len(sequence)]]
            assert tiny.distance(got, tiny.alone(model, sequence)) < 1e-5


@architectures
def test_every_layer_has_the_hidden_states_that_it_has_alone(architecture):
    model = tiny.model(architecture)
    sequences = [[3, 50, 200, 7, 8, 9, 10, 11, 12], [3, 50, 200, 7, 8, 99, 98, 97], [3, 50], [4]]
    trie = TokenTrie.build(sequences)
    with torch.no_grad():
        together = model(
            input_ids=trie.tokens[None],
            position_ids=trie.depth[None],
            attention_mask=masks_for(model, trie.allowed(), trie.depth, trie.depth),
            output_hidden_states=True,
        ).hidden_states
        for row, sequence in enumerate(sequences):
            apart = model(torch.tensor([sequence]), output_hidden_states=True).hidden_states
            for layer, expected in zip(together, apart, strict=True):
                got = layer[0, trie.nodes[row, : len(sequence)]]
                assert tiny.distance(got, expected[0]) < 1e-5


@architectures
def test_logits_are_computed_at_the_asked_nodes_only(architecture):
    model = tiny.model(architecture)
    trie = TokenTrie.build([[3, 50, 200], [3, 60]])
    nodes = torch.tensor([2, 0])
    with torch.no_grad():
        some_of = node_logits(model, trie, nodes)
        every = node_logits(model, trie, torch.arange(len(trie)))
    assert some_of.shape == (2, tiny.VOCAB)
    torch.testing.assert_close(some_of, every[nodes])


@architectures
@methods
def test_a_decoder_step_gives_the_logits_of_the_longer_sequence_alone(architecture, method):
    model = tiny.adapted(architecture, method)
    rows = [[3, 50, 200, 7, 8, 9], [3, 50, 200, 7, 99], [3, 50], [4]]
    with torch.no_grad():
        decoder = TrieDecoder(model, TokenTrie.build(rows))
        # Steps beyond the sliding window, and rows that end on the way.
        for step in range(8):
            for row, logits in zip(rows, decoder.logits, strict=True):
                assert tiny.distance(logits, tiny.alone(model, row)[-1]) < 1e-5
            if step in (2, 4):
                rows = rows[1:]
                decoder.keep(torch.arange(1, len(rows) + 1))
            tokens = [20 + step + 3 * i for i in range(len(rows))]
            rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
            decoder.step(torch.tensor(tokens))


def test_the_decoder_runs_a_shared_token_once():
    model = tiny.model("llama")
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    with torch.no_grad():
        decoder = TrieDecoder(model, TokenTrie.build([[3, 50, 200], [3, 50, 7], [3, 50]]))
        decoder.step(torch.tensor([1, 1, 1]))
    assert seen == [4, 3]


# --- masks and models that cannot be used ------------------------------------------------------


def test_only_sliding_layers_lose_what_lies_behind_their_window():
    model = tiny.model("gemma3")
    trie = TokenTrie.build([list(range(3, 3 + tiny.WINDOW + 3))])
    masks = masks_for(model, trie.allowed(), trie.depth, trie.depth)
    assert set(masks) == {"full_attention", "sliding_attention"}
    assert masks["full_attention"][0, 0, -1].tolist() == [True] * 9
    assert masks["sliding_attention"][0, 0, -1].tolist() == [False] * 3 + [True] * 6


def test_the_window_counts_positions_not_nodes():
    # Between the two beginnings and the end of the second path lie nodes of the first.
    model = tiny.model("gemma3")
    trie = TokenTrie.build([[3, 4, *range(10, 18)], [3, 5]])
    masks = masks_for(model, trie.allowed(), trie.depth, trie.depth)
    seen = masks["sliding_attention"][0, 0, trie.last[1]].nonzero().flatten()
    assert trie.tokens[seen].tolist() == [3, 5]


@architectures
def test_verify_accepts_what_follows_positions_and_mask(architecture):
    assert verify(tiny.model(architecture)) < 1e-5


@methods
def test_verify_accepts_adapted_models(method):
    assert verify(tiny.adapted("gemma3", method)) < 1e-5


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
@architectures
def test_verify_refuses_a_model_that_ignores_mask_or_positions(architecture, ignored, monkeypatch):
    model = tiny.model(architecture)
    honest = model.forward

    def deaf(**inputs):
        inputs[ignored] = None
        return honest(**inputs)

    monkeypatch.setattr(model, "forward", deaf)
    with pytest.raises(ModelError, match=model.config.model_type):
        verify(model)


def test_verify_asks_about_pieces_where_passes_are_cut(monkeypatch):
    calls, forward = [], branches.forward
    monkeypatch.setattr(
        branches, "forward", lambda *given, **kept: calls.append(1) or forward(*given, **kept)
    )
    model = tiny.model("qwen3")
    assert verify(model) < 1e-5
    assert not calls
    model.set_attn_implementation(attention.NAME)
    assert verify(model) < 1e-5
    assert len(calls) == 2  # one a layer


def test_verify_holds_pieces_against_the_mask(monkeypatch):
    forward = branches.forward

    def wrong(nodes, both, before, cut, scale, **kept):
        return forward(nodes, both, before, cut, 3 * scale, **kept)

    monkeypatch.setattr(branches, "forward", wrong)
    model = tiny.model("qwen3", head_dim=32)
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(ModelError, match="attention in pieces"):
        verify(model)


def test_verify_refuses_states_that_are_not_numbers():
    model = tiny.model("llama")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ModelError):
        verify(model)


def test_layers_that_are_not_attention_over_the_path_are_refused_by_name():
    text = SimpleNamespace(layer_types=["linear_attention"], model_type="odd", sliding_window=None)
    odd = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    trie = TokenTrie.build([[1, 2]])
    with pytest.raises(ModelError, match="linear_attention"):
        masks_for(odd, trie.allowed(), trie.depth, trie.depth)
