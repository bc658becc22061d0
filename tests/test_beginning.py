import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_emo.trie import TokenTrie, TrieDecoder, begin, node_logits

architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
methods = pytest.mark.parametrize("method", tiny.METHODS)

token = st.sampled_from([3, 50, 200])
# Together longer than Gemma-3's sliding window of six.
starts = st.lists(token, min_size=1, max_size=9)
rest = st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=5)


@architectures
@methods
@given(start=starts, sequences=rest)
@settings(max_examples=8, deadline=None)
def test_behind_a_beginning_every_token_has_the_logits_that_it_has_alone(
    architecture, method, start, sequences
):
    model = tiny.adapted(architecture, method)
    trie = TokenTrie.build(sequences)
    with torch.no_grad():
        beginning = begin(model, start)
        assert beginning is not None
        for _ in range(2):  # what one pass adds must not be seen by the next
            together = node_logits(model, trie, torch.arange(len(trie)), beginning)
            for row, sequence in enumerate(sequences):
                got = together[trie.nodes[row, : len(sequence)]]
                expected = tiny.alone(model, [*start, *sequence])[len(start) :]
                assert tiny.distance(got, expected) < 1e-5


@architectures
@methods
def test_a_decoder_steps_on_behind_a_beginning(architecture, method):
    model = tiny.adapted(architecture, method)
    start = [9, 3, 77, 3]
    rows = [[50, 200, 7, 8, 9], [50, 200, 7, 99], [50], [4]]
    with torch.no_grad():
        decoder = TrieDecoder(model, TokenTrie.build(rows), begin(model, start))
        for step in range(8):
            for row, logits in zip(rows, decoder.logits, strict=True):
                assert tiny.distance(logits, tiny.alone(model, [*start, *row])[-1]) < 1e-5
            if step in (2, 4):
                rows = rows[1:]
                decoder.keep(torch.arange(1, len(rows) + 1))
            tokens = [20 + step + 3 * i for i in range(len(rows))]
            rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
            decoder.step(torch.tensor(tokens))


def test_a_model_that_keeps_no_cache_has_no_beginning(monkeypatch):
    model = tiny.model("llama")
    own = model.forward
    monkeypatch.setattr(
        model, "forward", lambda past_key_values=None, use_cache=None, **rest: own(**rest)
    )
    assert begin(model, [3, 50]) is None
