"""Counting a trie's nodes without building it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_emo.node_counts import NodeCounts
from llm_emo.trie import TokenTrie

SEQUENCES = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=30
)


@given(sequences=SEQUENCES, data=st.data())
def test_the_count_is_that_of_the_trie(sequences, data):
    rows = st.lists(st.integers(0, len(sequences) - 1), min_size=1, unique=True)
    batches = data.draw(st.lists(rows, min_size=1, max_size=5))
    counted = NodeCounts(sequences).nodes(batches)
    built = [len(TokenTrie.build([sequences[row] for row in batch])) for batch in batches]
    assert counted.tolist() == built


def test_a_row_that_stands_twice_in_a_batch_is_refused():
    with pytest.raises(ValueError, match="twice"):
        NodeCounts([(1, 2), (1, 3)]).nodes([[0, 0]])
