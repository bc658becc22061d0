"""Attention over a trie in pieces: a trunk, and the branches that hang on it.

A dense mask over N nodes computes N x N scores, most of them between texts that have nothing in
common. Cut every largest subtree of at most W nodes off: what is left is the trunk, of T nodes,
which attends to itself, and each of the R branches attends to the trunk and to itself. That is
T x T + R x W x (T + W) scores, every visible one among them, so the result is the same.

Letters: N nodes, T trunk, R branches, W the widest of them, P prefix length, S = P + T what stands
above the branches, H heads, G key-value heads, F = H / G, D head dimension.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHARE = 0.7
"""Of the dense scores: a cut that leaves more of them is not worth its gathering."""

WIDTHS = 16
"""How many widths are tried; of more, evenly spaced ones."""


@dataclass(frozen=True)
class Branches:
    """A trie cut into pieces.

    `trunk` (T,) and `rows` (R, W) hold node numbers; behind a branch's end stand its root in
    `rows`, and N in `real`. `place` (N,) says where a node is among the trunk and, behind it, the
    flattened rows. The masks are what is added to scores, 0 or -inf: `on_trunk` (T, T), `on_path`
    (R, T), `on_row` (R, W, W).
    """

    trunk: Tensor
    rows: Tensor
    real: Tensor
    place: Tensor
    on_trunk: Tensor
    on_path: Tensor
    on_row: Tensor

    @classmethod
    def cut(cls, exit: Tensor, above: Tensor, width: int) -> "Branches":
        """Cut off every largest subtree of at most `width` nodes.

        Args:
            exit: The node behind each node's subtree, shape (N,).
            above: The size of the subtree of each node's parent, shape (N,); without one, more
                than `width`.
            width: W at most.
        """
        node = torch.arange(len(exit))
        size = exit - node
        trunk, roots = node[size > width], node[(size <= width) & (above > width)]
        offset = torch.arange(int(size[roots].max()))
        inside = offset < size[roots][:, None]  # (R, W)
        rows = torch.where(inside, roots[:, None] + offset, roots[:, None])
        place = torch.empty_like(node)
        place[trunk] = torch.arange(len(trunk))
        place[rows[inside]] = len(trunk) + torch.arange(rows.numel()).view_as(rows)[inside]
        sees = (rows[:, None] <= rows[..., None]) & (rows[..., None] < exit[rows][:, None])
        return cls(
            trunk=trunk,
            rows=rows,
            real=torch.where(inside, rows, len(exit)),
            place=place,
            on_trunk=_added((trunk <= trunk[:, None]) & (trunk[:, None] < exit[trunk])),
            on_path=_added((trunk < roots[:, None]) & (roots[:, None] < exit[trunk])),
            # As a query the root behind the end sees itself, so that no softmax is empty; as a
            # key nobody sees it a second time.
            on_row=_added(sees & inside[:, None]),
        )

    @property
    def scores(self) -> int:
        """Scores of one head: T x T + R x W x (T + W)."""
        return self.on_trunk.numel() + self.rows.numel() * (len(self.trunk) + self.rows.shape[1])

    def to(self, device: torch.device) -> "Branches":
        """Return the pieces on `device`."""
        return Branches(
            *(getattr(self, field.name).to(device) for field in dataclasses.fields(self))
        )


def cheapest(exit: Tensor, nodes: Tensor) -> Branches | None:
    """Return the cut with the fewest scores, or None where the dense mask is about as good.

    Args:
        exit: The node behind each node's subtree, shape (N,).
        nodes: The node of every sequence's every token, -1 behind its end, shape (B, L).
    """
    size = exit - torch.arange(len(exit))
    above = torch.full_like(size, len(exit) + 1)
    inner = nodes[:, 1:] >= 0
    above[nodes[:, 1:][inner]] = size[nodes[:, :-1][inner]]
    sizes, parents = size.numpy(), above.numpy()
    widths = np.unique(sizes)
    widths = widths[widths < len(exit)]
    if len(widths) > WIDTHS:
        widths = widths[np.linspace(0, len(widths) - 1, WIDTHS).astype(int)]
    best, fewest = None, SHARE * len(exit) ** 2
    for width in widths.tolist():
        trunk = int((sizes > width).sum())
        branches = int(((sizes <= width) & (parents > width)).sum())
        scores = trunk**2 + branches * width * (trunk + width)
        if scores < fewest:
            best, fewest = width, scores
    return None if best is None else Branches.cut(exit, above, best)


def _added(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)


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
    out: Tensor = _Attend.apply(query, key, value, prefix, branches, scale)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    """Each piece's products go straight into its scores, in either direction.

    Left to autograd, every slice and concatenation of the scores is one more pass over them,
    and such passes together cost more than the products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix: Tensor,
        branches: Branches,
        scale: float,
    ) -> Tensor:
        groups, width = key.shape[1], key.shape[3]
        (rows, each), trunk = branches.rows.shape, len(branches.trunk)
        shape = (groups, rows, query.shape[1] // groups, each)  # (G, R, F, W)
        own = prefix.permute(1, 2, 0, 3)  # (2, G, P, D)
        q, k, v = query[0], key[0], value[0]
        flat = branches.rows.flatten()
        tq = q.index_select(1, branches.trunk).view(groups, -1, width)  # (G, F*T, D)
        tk = torch.cat([own[0], k.index_select(1, branches.trunk)], 1)  # (G, S, D)
        tv = torch.cat([own[1], v.index_select(1, branches.trunk)], 1)
        rq = q.index_select(1, flat).view(groups, -1, rows, each, width)
        rq = rq.transpose(1, 2).reshape(groups, -1, width)  # (G, R*F*W, D)
        rk = k.index_select(1, flat).view(-1, each, width)  # (G*R, W, D)
        rv = v.index_select(1, flat).view(-1, each, width)

        above = len(prefix) + trunk  # S
        ts = q.new_zeros(groups, shape[2], trunk, above)
        ts[..., len(prefix) :] = branches.on_trunk
        ts = ts.flatten(1, 2).baddbmm_(tq, tk.transpose(1, 2), alpha=scale)
        rs = q.new_empty(*shape, above + each)
        rs[..., : len(prefix)] = 0
        rs[..., len(prefix) : above] = branches.on_path[:, None, None]
        rs[..., above:] = branches.on_row[:, None]
        rs = rs.flatten(1, 3)  # (G, R*F*W, S+W)
        rs[..., :above].baddbmm_(rq, tk.transpose(1, 2), alpha=scale)
        _beside(rs, above, rows).baddbmm_(_beside(rq, 0, rows), rk.transpose(1, 2), alpha=scale)
        tp, rp = ts.softmax(-1), rs.softmax(-1)

        out = q.new_empty(trunk + rows * each, q.shape[0], width)
        out[:trunk] = (tp @ tv).view(q.shape[0], trunk, width).transpose(0, 1)
        ro = rp[..., :above] @ tv
        _beside(ro, 0, rows).baddbmm_(_beside(rp, above, rows), rv)
        out[trunk:].view(rows, each, groups, -1, width).copy_(
            ro.view(*shape, width).permute(1, 3, 0, 2, 4)
        )
        ctx.save_for_backward(tq, tk, tv, rq, rk, rv, tp, rp)
        ctx.branches, ctx.scale, ctx.prefix = branches, scale, len(prefix)
        return out.index_select(0, branches.place)[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tq, tk, tv, rq, rk, rv, tp, rp = ctx.saved_tensors
        branches, scale, length = ctx.branches, ctx.scale, ctx.prefix
        groups, above, width = tk.shape
        (rows, each), trunk, heads = branches.rows.shape, len(branches.trunk), grad.shape[2]
        # Node N gets no gradient: the root that stands again behind its branch's end.
        padded = torch.nn.functional.pad(grad[0].flatten(1), (0, 0, 0, 1))  # (N+1, H*D)
        tg = padded.index_select(0, branches.trunk).view(trunk, heads, width)
        tg = tg.transpose(0, 1).reshape(groups, -1, width)
        rg = padded.index_select(0, branches.real.flatten()).view(rows, each, groups, -1, width)
        rg = rg.permute(2, 0, 3, 1, 4).reshape(groups, -1, width)  # (G, R*F*W, D)
        query, gradient = _beside(rq, 0, rows), _beside(rg, 0, rows)

        ts = torch._softmax_backward_data(tg @ tv.transpose(1, 2), tp, -1, tp.dtype)
        rs = torch.empty_like(rp)
        torch.bmm(rg, tv.transpose(1, 2), out=rs[..., :above])
        torch.bmm(gradient, rv.transpose(1, 2), out=_beside(rs, above, rows))
        rs = torch._softmax_backward_data(rs, rp, -1, rp.dtype)
        up, beside = rs[..., :above], _beside(rs, above, rows)

        # The scores stand behind: their rows have gaps, which a product can skip but not turn.
        dv = torch.baddbmm(tg.transpose(1, 2) @ tp, rg.transpose(1, 2), rp[..., :above])
        dk = torch.baddbmm(tq.transpose(1, 2) @ ts, rq.transpose(1, 2), up).mul_(scale)
        drv = gradient.transpose(1, 2) @ _beside(rp, above, rows)
        drk = (query.transpose(1, 2) @ beside).mul_(scale)
        dv, dk, drv, drk = (part.transpose(1, 2) for part in (dv, dk, drv, drk))
        drq = up @ tk
        _beside(drq, 0, rows).baddbmm_(beside, rk)
        drq = drq.view(groups, rows, -1, each, width).transpose(1, 2).reshape(heads, -1, width)

        def whole(first: Tensor, second: Tensor) -> Tensor:
            both = torch.cat([first, second.reshape(first.shape[0], -1, width)], 1)
            return both.index_select(1, branches.place)[None]

        return (
            whole((ts @ tk).view(heads, trunk, width), drq).mul_(scale),
            whole(dk[:, length:], drk),
            whole(dv[:, length:], drv),
            torch.stack([dk[:, :length], dv[:, :length]]).permute(2, 0, 1, 3) if length else None,
            None,
            None,
        )


def _beside(rows: Tensor, first: int, count: int) -> Tensor:
    """Return the columns from `first` on of (G, R*F*W, X), one branch apart: (G*R, F*W, ...)."""
    groups, every, _ = rows.shape
    return rows[..., first:].view(groups, count, every // count, -1).flatten(0, 1)
