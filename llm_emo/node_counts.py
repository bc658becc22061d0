"""How many nodes the token trie of any batch has, without building it. No torch.

A trie of B sequences has as many nodes as they have tokens, less what each has in common with
the one before it in lexicographic order. What two sequences have in common is the least of what
neighbours between them have in common, and range minima are looked up in a table; so all batches
of all epochs are counted in a few array operations.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


class NodeCounts:
    """Counts the nodes of batches of rows.

    Args:
        sequences: The token ids of all rows that batches are made of.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        order = sorted(range(len(sequences)), key=lambda row: tuple(sequences[row]))
        self._rank = np.empty(len(order), dtype=np.int64)
        self._rank[order] = np.arange(len(order))
        self._length = np.array([len(sequences[row]) for row in order], dtype=np.int64)
        shared = [0] * len(order)
        for place in range(1, len(order)):
            shared[place] = _common(sequences[order[place - 1]], sequences[order[place]])
        # table[j][i] is the least of the 2^j entries from i on.
        self._table = [np.array(shared, dtype=np.int64)]
        while 2 ** len(self._table) <= len(order):
            last, step = self._table[-1], 2 ** (len(self._table) - 1)
            self._table.append(np.minimum(last[:-step], last[step:]))

    def nodes(self, batches: Iterable[Sequence[int]]) -> Numbers:
        """Return the number of nodes of every batch of row numbers, in their order.

        >>> NodeCounts([(5, 6, 7), (5, 6, 8), (5, 6)]).nodes([[0, 1, 2], [2], [0, 2]]).tolist()
        [4, 2, 3]
        """
        listed = [list(batch) for batch in batches]
        counted = np.zeros(len(listed), dtype=np.int64)
        for size in {len(batch) for batch in listed}:
            places = [place for place, batch in enumerate(listed) if len(batch) == size]
            rows = np.array([listed[place] for place in places], dtype=np.int64)
            counted[places] = self._of_one_size(rows)
        return counted

    def _of_one_size(self, rows: Numbers) -> Numbers:
        """Count (M, B) rows; return (M,)."""
        ranks = np.sort(self._rank[rows], axis=1)
        tokens = self._length[ranks].sum(axis=1)
        first, last = ranks[:, :-1] + 1, ranks[:, 1:] + 1  # what lies between: [first, last)
        if not first.size:
            return tokens  # type: ignore[no-any-return]
        if (ranks[:, 1:] == ranks[:, :-1]).any():
            raise ValueError("a row stands twice in a batch")
        level = np.frexp(last - first)[1] - 1  # floor of the binary logarithm
        shared = np.zeros_like(first)
        for j, table in enumerate(self._table):
            at = level == j
            if at.any():
                shared[at] = np.minimum(table[first[at]], table[last[at] - 2**j])
        return tokens - shared.sum(axis=1)  # type: ignore[no-any-return]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the leading tokens that `a` and `b` have in common."""
    length = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        length += 1
    return length
