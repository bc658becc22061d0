"""Attention over a trie in pieces: rows of nodes that follow each other, and the path above each.

A dense mask over N nodes computes N x N scores, most of them between texts that have nothing in
common. Nodes are numbered depth-first, so of all nodes in front of a row a, a + 1, ..., its queries
see ancestors of a and no others: k < a <= q < exit[k] says that a, too, is in k's subtree. So a row
attends to the path to its first node and to itself, under a mask that keeps branches apart, and
every visible pair of nodes is among these scores. Rows are a few nodes wide and begin where paths
are short, such as at the next text.

In compiled loops a row has the columns that it needs. As products of a library all rows are one,
so they are filled up to the widest; there every row gets a copy of its columns' keys and values,
and copies are a part of what a cut costs: narrow rows have few scores and many copies.

Letters: N nodes, R rows, W nodes of the widest, A nodes of the longest path, M = R x W places in
rows, P prefix length, C columns of a query's scores (prefix, path, row, filling), H heads,
G key-value heads, F = H / G, D head dimension.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from llm_emo import native_attention

SHARE = 0.7
"""Of the dense scores: rows filled up that cost more are not worth their gathering."""

WIDTH = 48
"""Of rows for compiled loops, in nodes; in the second half of it they end where paths are short."""

WIDTHS = range(8, 161, 4)
"""Of rows as products, all of them full but the last; of these the cheapest."""

COLUMNS = 32
"""Columns are filled up to a multiple of this: softmax in bfloat16 is slow over a ragged end."""

Kept = TypeVar("Kept")


class Filled(NamedTuple):
    """Rows filled up to the widest, on the device of a pass."""

    queries: Tensor
    """The node of each place, shape (M,)."""
    place: Tensor
    """Where each node is among them, shape (N,)."""
    columns: Tensor
    """The node behind each column of each row, shape (R (C - P),), any behind filling."""
    order: Tensor
    """The columns of all rows without filling, sorted by their nodes."""
    first: Tensor
    """Where each node's begin among these, shape (N,)."""
    bias: Tensor
    """Shape (M, 1, C)."""


@dataclass(frozen=True)
class Branches:
    """A trie cut into rows.

    `exit` (N,) is the trie's. Row r holds the nodes from `starts[r]` to `starts[r + 1]`, of shape
    (R + 1,); the first `lengths[r]` of `paths[r]`, shapes (R,) and (R, A), are the ancestors of its
    first node. All are int64, on the CPU.
    """

    exit: Tensor
    starts: Tensor
    paths: Tensor
    lengths: Tensor

    def __getstate__(self) -> dict[str, Tensor]:
        """Leave out what was made for this process: it holds pointers."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def cut(cls, exit: Tensor, depth: Tensor, width: int, least: int) -> "Branches":
        """Cut a trie into rows.

        Args:
            exit: The node behind each node's subtree, shape (N,).
            depth: How many ancestors each has, shape (N,).
            width: W at most.
            least: How many nodes rows have at least, but the last. From there on they end where
                the path to the next is shortest; of such places, at the last.
        """
        ends, depths = exit.numpy(), depth.numpy()
        starts = [0]
        while len(ends) - starts[-1] > width:
            first = starts[-1] + least
            behind = depths[first : starts[-1] + width + 1][::-1]
            starts.append(first + len(behind) - 1 - int(behind.argmin()))
        lengths = depths[starts]
        starts.append(len(ends))
        paths = np.zeros((len(lengths), lengths.max()), dtype=np.int64)
        for row, start in enumerate(starts[:-1]):
            paths[row, : lengths[row]] = np.flatnonzero(ends[:start] > start)
        numbers = (torch.as_tensor(one, dtype=torch.long) for one in (starts, paths, lengths))
        return cls(exit, *numbers)

    @property
    def widths(self) -> Tensor:
        """How many nodes each row has, shape (R,)."""
        return self.starts.diff()

    def cost(self, front: int, copied: float | None) -> float:
        """Return what the pieces cost, in scores of one head; see `cheapest`."""
        columns = front + self.lengths + self.widths
        if copied is None:
            return float((self.widths * columns).sum())
        return float(len(columns) * (self.widths.max() + copied) * columns.max())

    @cached_property
    def queries(self) -> Tensor:
        """The node of each place, shape (R, W); those that no node fills repeat their row's last.

        Such a query sees what that node sees, so that no softmax is empty; nobody gets its result.
        """
        inside = torch.arange(int(self.widths.max()))
        return torch.minimum(self.starts[:-1, None] + inside, self.starts[1:, None] - 1)

    @cached_property
    def place(self) -> Tensor:
        """Where each node is among the M places, shape (N,)."""
        row = torch.arange(len(self.lengths)).repeat_interleave(self.widths)
        return torch.arange(len(self.exit)) + row * self.queries.shape[1] - self.starts[row]

    def columns(self, prefix: int) -> Tensor:
        """Return the nodes behind the columns of each row, shape (R, C - P); -1 behind filling."""
        used = self.lengths + self.widths
        count = int(used.max())
        at = torch.arange(count + -(prefix + count) % COLUMNS)
        own = at - self.lengths[:, None]  # which node of the row
        path = torch.nn.functional.pad(self.paths, (0, len(at) - self.paths.shape[1]))
        nodes = torch.where(own < 0, path, self.starts[:-1, None] + own)
        return nodes.masked_fill_(at >= used[:, None], -1)

    def bias(self, prefix: int, dtype: torch.dtype) -> Tensor:
        """Return what is added to scores, 0 or -inf, shape (M, 1, C)."""
        query, column = self.queries[..., None], self.columns(prefix)[:, None]
        seen = (column >= 0) & (column <= query) & (query < self.exit[column])  # (R, W, C - P)
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
        return torch.nn.functional.pad(bias, (prefix, 0)).flatten(0, 1)[:, None]

    def filled(self, prefix: int, dtype: torch.dtype, device: torch.device) -> Filled:
        """Return what products of all rows read of this; made once, for all layers of a pass."""
        key = (prefix, dtype, device)
        return self._once(key, lambda: self._filled(prefix, dtype, device))

    def compiled(self, groups: int, nodes: Tensor, before: Tensor) -> native_attention.Pieces:
        """Return what compiled loops read of this, made once; see `forward` for the arguments."""
        _, length, size = before.shape
        key = (length, groups, nodes.shape[1], size, nodes.dtype)
        return self._once(key, lambda: self._compiled(groups, nodes, before))[0]

    def _once(self, key: Any, make: Callable[[], Kept]) -> Kept:
        kept: dict[Any, Kept] = self.__dict__.setdefault("_kept", {})
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def _filled(self, prefix: int, dtype: torch.dtype, device: torch.device) -> Filled:
        columns = self.columns(prefix).flatten()
        nodes, order = columns.sort(stable=True)
        filling = int((nodes < 0).sum())
        first = torch.searchsorted(nodes[filling:], torch.arange(len(self.exit)))
        parts = (self.queries.flatten(), self.place, columns.clamp(min=0), order[filling:], first)
        return Filled(*(part.to(device) for part in (*parts, self.bias(prefix, dtype))))

    def _compiled(
        self, groups: int, nodes: Tensor, before: Tensor
    ) -> tuple[native_attention.Pieces, tuple[Tensor, ...]]:
        _, length, size = before.shape
        widths, longest = self.widths, self.paths.shape[1]
        columns = -(-(length + self.lengths + widths) // COLUMNS) * COLUMNS
        scores = torch.nn.functional.pad((widths * columns).cumsum(0), (1, 0))
        inner = torch.unique(self.paths[torch.arange(longest) < self.lengths[:, None]])
        slots = torch.full_like(self.exit, -1)
        slots[inner] = torch.arange(len(inner))
        bias = self._biases(length, columns, scores, nodes.dtype)
        parts = (self.starts, self.lengths, self.paths, scores, inner, slots, bias)
        pieces = native_attention.Pieces(
            *(part.data_ptr() for part in parts),
            len(self.lengths), int(widths.max()), length, longest, len(inner),
            int(columns.max()), groups, nodes.shape[1] // groups // size, size,
        )  # fmt: skip
        return pieces, parts  # pointers keep nothing alive

    def _biases(self, prefix: int, columns: Tensor, scores: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the bias of each row's nodes and its own columns, one row behind the other."""
        out = torch.full((int(scores[-1]),), -torch.inf, dtype=dtype)
        for row, (begin, end) in enumerate(pairwise(scores.tolist())):
            nodes = torch.arange(*self.starts[row : row + 2].tolist())
            seen = torch.cat([self.paths[row, : self.lengths[row]], nodes])
            allowed = (seen <= nodes[:, None]) & (nodes[:, None] < self.exit[seen])
            bias = out[begin:end].view(-1, int(columns[row]))
            bias[:, :prefix] = 0
            bias[:, prefix : prefix + len(seen)].masked_fill_(allowed, 0)
        return out


def cheapest(
    exit: Tensor, depth: Tensor, *, front: int = 0, copied: float | None = 0.0
) -> Branches | None:
    """Return the cut that costs least, or None where the dense mask is about as good.

    As products, a row has as many columns as the widest; each costs W scores, and a key and a value
    that are copied.

    Args:
        exit: The node behind each node's subtree, shape (N,).
        depth: How many ancestors each has, shape (N,).
        front: Columns that stand in front of all nodes: a beginning's and a prefix's.
        copied: What copying a node's key and value costs, in scores of one head; None for compiled
            loops, which copy nothing and take rows as they are, so that every trie is worth it.
    """
    if copied is None:
        return Branches.cut(exit, depth, WIDTH, WIDTH // 2 + 1)
    best, least = None, SHARE * len(exit) * (front + len(exit))
    for width in WIDTHS:
        longest = int(depth[::width].max())
        cost = -(-len(exit) // width) * (width + copied) * (front + longest + width)
        if cost < least:
            best, least = width, cost
    return None if best is None else Branches.cut(exit, depth, best, best)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    branches: Branches,
    prefix: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """Attend from (1, H, N, D) to (1, G, A + N, D); return (1, N, H, D).

    Every node sees the A columns in front of the trie's own, such as a cached beginning, and
    `prefix`, keys and values of shape (P, 2, G, D).
    """
    front = key.shape[2] - query.shape[2]
    before = torch.stack([key[0, :, :front], value[0, :, :front]]).permute(2, 0, 1, 3)
    key, value = key[:, :, front:], value[:, :, front:]
    prefix = before if prefix is None else torch.cat([prefix.to(key.dtype), before])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Where projections wrote them, node by node, whatever the views say: cheap to gather from.
    nodes = query[0].transpose(0, 1).flatten(1)
    both = torch.cat([key[0], value[0]]).transpose(0, 1).flatten(1)
    before = prefix.permute(1, 2, 0, 3).flatten(0, 1)
    learning = torch.is_grad_enabled()  # asked here: inside a function it is off
    out: Tensor = _Attend.apply(nodes, both, before, branches, scale, learning)  # type: ignore[no-untyped-call]
    return out.view(1, len(out), -1, query.shape[-1])


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        nodes: Tensor,
        both: Tensor,
        before: Tensor,
        branches: Branches,
        scale: float,
        learning: bool,
    ) -> Tensor:
        out, saved = forward(nodes, both, before, branches, scale, learning=learning)
        ctx.save_for_backward(*saved)
        ctx.queries = nodes.shape[1]
        ctx.branches, ctx.scale = branches, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dnodes, dbefore = backward(grad, ctx.saved_tensors, ctx.branches, ctx.scale)
        return *dnodes.tensor_split([ctx.queries], 1), dbefore, None, None, None


Saved = tuple[Tensor, Tensor, Tensor, Tensor]


def forward(
    nodes: Tensor,
    both: Tensor,
    before: Tensor,
    branches: Branches,
    scale: float,
    *,
    learning: bool,
) -> tuple[Tensor, Saved]:
    """Attend, and return the result, shape (N, H*D), with what `backward` needs.

    Products go straight into scores that hold the mask already, here and in `backward`. Left to
    autograd, every step in between is one more pass over them, and such passes together cost more
    than the products.

    Args:
        nodes: Queries, shape (N, H*D).
        both: Keys, then values, shape (N, 2G*D).
        before: Keys, then values, that every node sees, shape (2G, P, D).
        branches: The trie's pieces.
        scale: What scores are multiplied by.
        learning: Whether there will be a backward pass.
    """
    parts, length, size = before.shape
    groups = parts // 2
    if native_attention.attends(nodes, both, before):
        before = before.contiguous()
        pieces = branches.compiled(groups, nodes, before)
        out, shares = native_attention.attend(nodes, both, before, pieces, scale, keep=learning)
        return out, (nodes, both, shares, before)
    rows, filled = len(branches.lengths), branches.filled(length, nodes.dtype, nodes.device)
    each = len(filled.queries) // rows
    q = _grouped(nodes.index_select(0, filled.queries), groups)
    q = q.view(groups * rows, -1, size).mul_(scale)  # (G*R, W*F, D)
    own = both.index_select(0, filled.columns).view(rows, -1, parts, size)
    front = before[:, None].expand(-1, rows, -1, -1)
    kv = torch.cat([front, own.permute(2, 0, 1, 3)], 2).view(2, groups * rows, -1, size)

    width = filled.bias.shape[-1]
    shares = q.new_empty(groups, rows * each, q.shape[1] // each, width).copy_(filled.bias)
    shares = shares.view(*q.shape[:2], -1).baddbmm_(q, kv[0].transpose(1, 2)).softmax(-1)
    return _ungrouped(shares @ kv[1], filled, groups), (q, kv, shares, before)


def backward(grad: Tensor, saved: Saved, branches: Branches, scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of `nodes` and `both`, side by side, and of `before`.

    `grad` has shape (N, H*D).
    """
    q, kv, shares, before = saved
    if shares.dim() == 1:  # as compiled loops leave them
        pieces = branches.compiled(len(before) // 2, q, before)
        return native_attention.attend_backward(grad, shares, q, kv, before, pieces, scale)
    rows, (parts, length, size) = len(branches.lengths), before.shape
    groups, filled = parts // 2, branches.filled(length, q.dtype, q.device)
    # A place that no node fills gets no gradient.
    nodes = grad.new_zeros(len(filled.queries), grad.shape[1]).index_copy_(0, filled.place, grad)
    g = _grouped(nodes, groups).view_as(q)
    ds = torch._softmax_backward_data(g @ kv[1].transpose(1, 2), shares, -1, shares.dtype)
    dnodes = _ungrouped(ds @ kv[0], filled, groups).mul_(scale)

    dkv = torch.empty_like(kv)
    torch.bmm(ds.transpose(1, 2), q, out=dkv[0])
    torch.bmm(shares.transpose(1, 2), g, out=dkv[1])
    dkv = dkv.view(parts, rows, -1, size)
    # Of each node the sum over all columns that it is behind.
    columns = dkv[:, :, length:].permute(1, 2, 0, 3).flatten(0, 1).flatten(1)
    dboth, *_ = torch.embedding_bag(columns, filled.order, filled.first)
    return torch.cat([dnodes, dboth], 1), dkv[:, :, :length].sum(1)


def _grouped(nodes: Tensor, groups: int) -> Tensor:
    """Return (X, G*Y) as (G, X, Y)."""
    apart = nodes.view(len(nodes), groups, nodes.shape[1] // groups)
    return apart.transpose(0, 1).contiguous()


def _ungrouped(places: Tensor, filled: Filled, groups: int) -> Tensor:
    """Return (G*R, W*F, D), gathered at each node's place, as (N, G*F*D)."""
    parts = places.view(groups, len(filled.queries), -1)  # (G, M, F*D)
    return parts.transpose(0, 1).index_select(0, filled.place).flatten(1)
