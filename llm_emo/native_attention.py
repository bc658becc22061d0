"""Attention over a trie in pieces, compiled: `native_attention.c`, as `branches.py` calls it.

Letters as there: N nodes, P prefix length, G key-value heads, F heads of each, D head dimension.
"""

import ctypes

import torch
from torch import Tensor

from llm_emo.native import COUNT, POINTER, library, multiplies, serves

COLUMNS = 32
"""What the head dimension is a multiple of."""


class Pieces(ctypes.Structure):
    """The pieces, and the sizes of a pass; as in `native_attention.c`.

    Pointers keep nothing alive.
    """

    _fields_ = (
        *(
            (name, POINTER)
            for name in ("starts", "lengths", "paths", "scores", "inner", "slots", "bias")
        ),
        *((name, COUNT) for name in "RWPATCGFD"),
    )


class _States(ctypes.Structure):
    _fields_ = (("both", POINTER), ("before", POINTER), ("stride", COUNT))


def attends_in(dtype: torch.dtype, size: int) -> bool:
    """Whether loops serve such numbers, in heads of this size, where they lie as they should."""
    return size % COLUMNS == 0 and multiplies(dtype)


def attends(nodes: Tensor, both: Tensor, before: Tensor) -> bool:
    """Whether loops serve such queries, keys and values (see `attend`).

    They serve those without numbers, too, so that plans count what is kept.
    """
    return (
        nodes.stride(-1) == both.stride(-1) == 1
        and attends_in(nodes.dtype, before.shape[-1])
        and (nodes.is_meta or serves(nodes, both, before))
    )


def attend(
    nodes: Tensor, both: Tensor, before: Tensor, pieces: Pieces, scale: float, *, keep: bool
) -> tuple[Tensor, Tensor]:
    """Return what queries attend to, (N, G*F*D), and their shares in it, if they are to be kept.

    Of each key-value head, row and query there are as many as the row has columns, filled up.

    Args:
        nodes: Queries, shape (N, G*F*D), each row contiguous.
        both: Keys, then values, shape (N, 2G*D), each row contiguous.
        before: Keys, then values, that every node sees, shape (2G, P, D), contiguous.
        pieces: Of the trie.
        scale: What scores are multiplied by.
        keep: Whether shares are asked for, which the backward pass reads.
    """
    out = nodes.new_empty(nodes.shape)
    threads, at = _threads(pieces), ctypes.byref(pieces)
    shares = nodes.new_empty(library(nodes.dtype).attend_shares(at) if keep else 0)
    room = nodes.new_empty(threads * library(nodes.dtype).attend_room(at))
    states = _States(both.data_ptr(), before.data_ptr(), both.stride(0))
    if nodes.is_meta:
        return out, shares
    library(nodes.dtype).attend(
        at, ctypes.byref(states), nodes.data_ptr(), nodes.stride(0), scale,
        out.data_ptr(), shares.data_ptr() if keep else None, threads, room.data_ptr(),
    )  # fmt: skip
    return out, shares


def attend_backward(
    grad: Tensor,
    shares: Tensor,
    nodes: Tensor,
    both: Tensor,
    before: Tensor,
    pieces: Pieces,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of queries, keys and values, (N, (F + 2)*G*D), and of `before`.

    Args:
        grad: Of what `attend` returned, shape (N, G*F*D).
        shares: What it returned.
        nodes: What it was given, as are those that follow.
        both: See there.
        before: See there.
        pieces: See there.
        scale: See there.
    """
    grad = grad.contiguous()
    dnodes = grad.new_empty(len(grad), nodes.shape[1] + both.shape[1])
    dbefore = torch.empty_like(before)
    threads, at = _threads(pieces), ctypes.byref(pieces)
    room = grad.new_empty(threads * library(nodes.dtype).attend_backward_room(at))
    states = _States(both.data_ptr(), before.data_ptr(), both.stride(0))
    if nodes.is_meta:
        return dnodes, dbefore
    library(nodes.dtype).attend_backward(
        at, ctypes.byref(states), nodes.data_ptr(), nodes.stride(0), scale, grad.data_ptr(),
        shares.data_ptr(), dnodes.data_ptr(), dbefore.data_ptr(), threads, room.data_ptr(),
    )  # fmt: skip
    return dnodes, dbefore


def _threads(pieces: Pieces) -> int:
    """Return how many have something to do; each takes room of its own."""
    return max(1, min(torch.get_num_threads(), int(pieces.G * pieces.R)))
