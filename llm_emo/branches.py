"""Attention over a trie in pieces: a trunk, and the branches that hang on it.

A dense mask over N nodes computes N x N scores, most of them between texts that have nothing in
common. Cut every largest subtree of at most W nodes off, and lay these branches into rows of W
queries, as many into a row as fit; a row's queries attend to the trunk and to the row, in which a
mask keeps branches apart. What is left is the trunk; its T nodes fill what room the rows have left
and rows of their own, and attend to the trunk alone. With R rows that is R x W x (T + W) scores,
every visible one among them, so the result is the same.

Every row gets a copy of the trunk's keys and values in front of its own, so that all of its scores
are one product. Products with the trunk and with the row apart would copy nothing, but there would
be twice as many of half the size, which several cores share badly. The copies are a part of what a
cut costs: narrow rows have few scores and many copies.

Letters: N nodes, T trunk, R rows, W their width, M = R x W places in rows, P prefix length,
S = P + T what stands above the rows, C columns of a query's scores, H heads, G key-value heads,
F = H / G, D head dimension.
"""

import dataclasses
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_emo import native_attention

SHARE = 0.7
"""Of the dense scores: a cut that costs more is not worth its gathering."""

WIDTHS = 48
"""For how many widths at most branches are laid into rows, those first that promise most."""

COLUMNS = 32
"""Columns are filled up to a multiple of this: softmax in bfloat16 is slow over a ragged end."""


@dataclass(frozen=True)
class Branches:
    """A trie cut into pieces.

    `trunk` (T,) and `rows` (R, W) hold node numbers; places that no node fills repeat their row's
    first. `place` (N,) says where a node is among the M places. `above` (M, T) and `beside` (M, W)
    say what a place's query sees of the trunk and of its own row.
    """

    trunk: Tensor
    rows: Tensor
    place: Tensor
    above: Tensor
    beside: Tensor

    def __getstate__(self) -> dict[str, Tensor]:
        """Leave out what was made for this process: it holds pointers."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def cut(cls, exit: Tensor, above: Tensor, width: int) -> "Branches":
        """Cut off every largest subtree of at most `width` nodes.

        Args:
            exit: The node behind each node's subtree, shape (N,).
            above: The size of the subtree of each node's parent, shape (N,); without one, more
                than `width`.
            width: W.
        """
        node = torch.arange(len(exit))
        size = exit - node
        cut = size <= width
        trunk, roots = node[~cut], node[cut & (above > width)]
        starts, full = _laid(size[roots].tolist(), width)
        rows = max(full, -(-len(exit) // width))

        place = torch.empty_like(node)
        # A branch's nodes follow each other, in numbers as in places.
        place[cut] = node[cut] + (torch.tensor(starts) - roots).repeat_interleave(size[roots])
        key = torch.zeros(rows * width, dtype=torch.bool)
        key[place[cut]] = True
        place[trunk] = (~key).nonzero()[: len(trunk), 0]

        query = torch.full((rows * width,), -1)
        query[place] = node
        query = query.view(rows, width)
        # Such a query sees the first node of its row, so that no softmax is empty; as a key nobody
        # sees it a second time, nor the trunk.
        query = torch.where(query < 0, query[:, :1], query)
        beside = _sees(query[..., None], query[:, None], exit) & key.view(rows, 1, width)
        above_ = _sees(query.flatten()[:, None], trunk, exit)
        return cls(trunk, query, place, above_, beside.flatten(0, 1))

    def cost(self, front: int, copied: float) -> float:
        """Return what the pieces cost, in scores of one head; see `cheapest`."""
        rows, width = self.rows.shape
        return rows * (front + len(self.trunk) + width) * (width + copied)

    def bias(self, prefix: int, dtype: torch.dtype) -> Tensor:
        """Return what is added to scores, 0 or -inf, shape (M, 1, C): prefix, trunk, row, filling.

        Made once and kept, because all layers of a pass ask for the same; so are `columns`.
        """
        kept: dict[tuple[int, torch.dtype], Tensor] = self.__dict__.setdefault("_biases", {})
        if (prefix, dtype) not in kept:
            seen = torch.cat([self.above, self.beside], 1)
            seen = torch.nn.functional.pad(seen, (prefix, 0), value=True)
            seen = torch.nn.functional.pad(seen, (0, self._filling(prefix)))
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            kept[prefix, dtype] = bias.masked_fill_(~seen, -torch.inf)[:, None]
        return kept[prefix, dtype]

    def columns(self, prefix: int) -> Tensor:
        """Return the nodes behind the columns of each row, shape (R, C - P)."""
        kept: dict[int, Tensor] = self.__dict__.setdefault("_columns", {})
        if prefix not in kept:
            trunk = self.trunk.expand(len(self.rows), -1)
            unseen = self.rows[:, :1].expand(-1, self._filling(prefix))  # any node
            kept[prefix] = torch.cat([trunk, self.rows, unseen], 1)
        return kept[prefix]

    def compiled(self, groups: int, nodes: Tensor, before: Tensor) -> native_attention.Pieces:
        """Return what compiled loops read of this; see `forward` for the arguments."""
        kept: dict[tuple[Any, ...], tuple[native_attention.Pieces, Tensor]]
        kept = self.__dict__.setdefault("_compiled", {})
        (rows, each), (_, length, size) = self.rows.shape, before.shape
        key = (length, groups, nodes.shape[1], size, nodes.dtype)
        if key not in kept:
            columns, bias = self.columns(length), self.bias(length, nodes.dtype)
            seen = bias[:, 0] == 0
            ends = (torch.arange(1, bias.shape[-1] + 1) * seen).amax(1)
            parts = (columns, self.rows, self.place, bias, self.trunk, ends)
            made = native_attention.Pieces(
                *(part.data_ptr() for part in parts), rows, each, length,
                length + len(self.trunk), bias.shape[-1], groups,
                nodes.shape[1] // groups // size, size,
            )  # fmt: skip
            kept[key] = (made, ends)  # the other parts are kept by this
        return kept[key][0]

    def _filling(self, prefix: int) -> int:
        return -(prefix + len(self.trunk) + self.rows.shape[1]) % COLUMNS

    def to(self, device: torch.device) -> "Branches":
        """Return the pieces on `device`."""
        return Branches(
            *(getattr(self, field.name).to(device) for field in dataclasses.fields(self))
        )


def _sees(query: Tensor, key: Tensor, exit: Tensor) -> Tensor:
    return (key <= query) & (query < exit[key])


def _laid(sizes: Sequence[int], width: int) -> tuple[list[int], int]:
    """Lay branches into rows of `width`: largest first, each where the least room stays.

    Returns the place at which each begins, and the number of rows.
    """
    starts, rows = [0] * len(sizes), 0
    room: list[tuple[int, int]] = []  # what is left of a row, and the row
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size = sizes[number]
        at = bisect_left(room, (size, 0))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row, rows = width, rows, rows + 1
        starts[number] = (row + 1) * width - left
        if left > size:
            insort(room, (left - size, row))
    return starts, rows


def cheapest(
    exit: Tensor, nodes: Tensor, *, front: int = 0, copied: float = 0.0
) -> Branches | None:
    """Return the cut that costs least, or None where the dense mask is about as good.

    A row has front + T + W columns. Each costs W scores, and a key and a value that are copied.

    Args:
        exit: The node behind each node's subtree, shape (N,).
        nodes: The node of every sequence's every token, -1 behind its end, shape (B, L).
        front: Columns that stand in front of all nodes: a beginning's and a prefix's.
        copied: What copying a node's key and value costs, in scores of one head.
    """
    size = exit - torch.arange(len(exit))
    above = torch.full_like(size, len(exit) + 1)
    inner = nodes[:, 1:] >= 0
    above[nodes[:, 1:][inner]] = size[nodes[:, :-1][inner]]
    sizes, parents = size.numpy(), above.numpy()
    widths = np.arange(1, len(exit))
    trunks = len(exit) - np.searchsorted(np.sort(sizes), widths, "right")
    costs = (front + trunks + widths) * (widths + copied)  # of a row
    fewest_rows = -(-len(exit) // widths)
    best, least = None, SHARE * len(exit) * (front + len(exit))
    for at in np.argsort(fewest_rows * costs, kind="stable")[:WIDTHS].tolist():
        if fewest_rows[at] * costs[at] >= least:
            break
        width = int(widths[at])
        _, rows = _laid(sizes[(sizes <= width) & (parents > width)].tolist(), width)
        found = max(rows, int(fewest_rows[at])) * float(costs[at])
        if found < least:
            best, least = width, found
    return None if best is None else Branches.cut(exit, above, best)


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
    out: Tensor = _Attend.apply(nodes, both, before, branches, scale)  # type: ignore[no-untyped-call]
    return out.view(1, len(out), -1, query.shape[-1])


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, nodes: Tensor, both: Tensor, before: Tensor, branches: Branches, scale: float
    ) -> Tensor:
        out, saved = forward(nodes, both, before, branches, scale)
        ctx.save_for_backward(*saved)
        ctx.queries = nodes.shape[1]
        ctx.branches, ctx.scale = branches, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dnodes, dbefore = backward(grad, ctx.saved_tensors, ctx.branches, ctx.scale)
        return *dnodes.tensor_split([ctx.queries], 1), dbefore, None, None


Saved = tuple[Tensor, Tensor, Tensor, Tensor]


def forward(
    nodes: Tensor, both: Tensor, before: Tensor, branches: Branches, scale: float
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
    """
    (rows, each), (parts, length, size) = branches.rows.shape, before.shape
    groups = parts // 2
    if native_attention.attends(nodes, both, before):
        before = before.contiguous()
        pieces = branches.compiled(groups, nodes, before)
        out, shares = native_attention.attend(nodes, both, before, pieces, scale)
        return out, (nodes, both, shares, before)
    q = _grouped(nodes.index_select(0, branches.rows.flatten()), groups)
    q = q.view(groups * rows, -1, size).mul_(scale)  # (G*R, W*F, D)
    own = both.index_select(0, branches.columns(length).flatten()).view(rows, -1, parts, size)
    front = before[:, None].expand(-1, rows, -1, -1)
    kv = torch.cat([front, own.permute(2, 0, 1, 3)], 2).view(2, groups * rows, -1, size)

    bias = branches.bias(length, nodes.dtype)
    shares = q.new_empty(groups, rows * each, q.shape[1] // each, bias.shape[-1]).copy_(bias)
    shares = shares.view(*q.shape[:2], -1).baddbmm_(q, kv[0].transpose(1, 2)).softmax(-1)
    return _ungrouped(shares @ kv[1], branches, groups), (q, kv, shares, before)


def backward(grad: Tensor, saved: Saved, branches: Branches, scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of `nodes` and `both`, side by side, and of `before`.

    `grad` has shape (N, H*D).
    """
    q, kv, shares, before = saved
    if shares.dim() == 4:  # as compiled loops leave them
        pieces = branches.compiled(len(before) // 2, q, before)
        return native_attention.attend_backward(grad, shares, q, kv, before, pieces, scale)
    (rows, each), (parts, length, size) = branches.rows.shape, before.shape
    groups, above = parts // 2, length + len(branches.trunk)
    # A place that no node fills gets no gradient.
    nodes = grad.new_zeros(rows * each, grad.shape[1]).index_copy_(0, branches.place, grad)
    g = _grouped(nodes, groups).view_as(q)
    ds = torch._softmax_backward_data(g @ kv[1].transpose(1, 2), shares, -1, shares.dtype)
    dnodes = _ungrouped(ds @ kv[0], branches, groups).mul_(scale)

    dkv = torch.empty_like(kv)
    torch.bmm(ds.transpose(1, 2), q, out=dkv[0])
    torch.bmm(shares.transpose(1, 2), g, out=dkv[1])
    dkv = dkv.view(parts, rows, -1, size)
    dup = dkv[:, :, :above].sum(1)  # (2G, S, D)
    drow = dkv[:, :, above : above + each].permute(1, 2, 0, 3).flatten(0, 1)  # (M, 2G, D)
    dboth = drow.index_select(0, branches.place)  # (N, 2G, D)
    dboth.index_copy_(0, branches.trunk, dup[:, length:].transpose(0, 1))
    return torch.cat([dnodes, dboth.flatten(1)], 1), dup[:, :length]


def _grouped(nodes: Tensor, groups: int) -> Tensor:
    """Return (X, G*Y) as (G, X, Y)."""
    apart = nodes.view(len(nodes), groups, nodes.shape[1] // groups)
    return apart.transpose(0, 1).contiguous()


def _ungrouped(places: Tensor, branches: Branches, groups: int) -> Tensor:
    """Return (G*R, W*F, D), gathered at each node's place, as (N, G*F*D)."""
    parts = places.view(groups, branches.rows.numel(), -1)  # (G, M, F*D)
    return parts.transpose(0, 1).index_select(0, branches.place).flatten(1)
