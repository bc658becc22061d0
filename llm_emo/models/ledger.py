"""What is alive at every moment: the bytes of storages, and the operations that made them.

Letters: K nodes with logits, V vocabulary.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products, by what they grow with.

    `tokens` grow with the nodes, `attention` with nodes times visible columns, `head` with the
    nodes that have logits.
    """

    tokens: float
    attention: float
    head: float


@dataclass(frozen=True)
class Footprint:
    """What one pass allocates beside the model and the optimiser's state, in bytes.

    `saved` is what is alive between the forward and the backward pass. `peak` is the most that is
    alive at any moment, `peak_logits` the part of it with a column per word of the vocabulary, and
    `logits` the most that such tensors take, then or at another moment.
    """

    saved: float
    peak: float
    peak_logits: float
    logits: float
    flops: Flops

    def beyond(self, further: "Footprint", by: float) -> "Footprint":
        """Go on from this one over `further` in a straight line; `by` is 1 at `further`."""

        def at(a: float, b: float) -> float:
            return a + (b - a) * by

        a, b = self.flops, further.flops
        return Footprint(
            saved=at(self.saved, further.saved),
            peak=at(self.peak, further.peak),
            peak_logits=at(self.peak_logits, further.peak_logits),
            logits=at(self.logits, further.logits),
            flops=Flops(at(a.tokens, b.tokens), at(a.attention, b.attention), at(a.head, b.head)),
        )


_aten: Any = torch.ops.aten
CPU_KERNEL = _aten._scaled_dot_product_flash_attention_for_cpu
CUDA_KERNEL = _aten._scaled_dot_product_efficient_attention
"""Fused attention as torch takes it with a mask."""

_CUDA_KERNEL_BACKWARD = _aten._scaled_dot_product_efficient_attention_backward
_CPU_KERNEL_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward

_ATTENTION: dict[Any, Any] = {
    CUDA_KERNEL: flop_registry[CUDA_KERNEL],
    _CUDA_KERNEL_BACKWARD: flop_registry[_CUDA_KERNEL_BACKWARD],
    # torch counts nothing for these; they multiply the same matrices.
    CPU_KERNEL: flop_registry[CUDA_KERNEL],
    _CPU_KERNEL_BACKWARD: flop_registry[_CUDA_KERNEL_BACKWARD],
    # Queries with keys, shares with values. Other batched products of a decoder are small.
    _aten.bmm: flop_registry[_aten.bmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
}

# torch's registry leaves out products that are added in place.
_PRODUCTS: dict[Any, Any] = flop_registry | _ATTENTION | {_aten.addmm_: flop_registry[_aten.addmm]}


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, counts the bytes of the storages that are alive on one kind of device.

    It counts what passes torch's dispatcher, on the meta device and on real ones alike.

    Args:
        device: The type of device: meta, cpu, cuda.
        vocabulary: Tensors with that many columns are counted as logits, too.
    """

    def __init__(self, device: str, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.vocabulary = device, vocabulary
        self._known: dict[int, weakref.ref[Any]] = {}
        self.live = self.live_logits = 0
        self.start()

    def start(self) -> None:
        """Count from here: what is alive already is no part of the footprint."""
        self._before = self.peak = self.live
        self.peak_logits = self.logits = self.live_logits
        self.operations = {"tokens": 0, "attention": 0, "head": 0}

    def since(self) -> int:
        """Return the bytes that are alive beside those of the start."""
        return self.live - self._before

    def footprint(self, saved: int = 0) -> Footprint:
        """Return what was counted since `start`."""
        return Footprint(
            saved=saved,
            peak=self.peak - self._before,
            peak_logits=self.peak_logits,
            logits=self.logits,
            flops=Flops(**self.operations),
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and note what it left."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            # Copies of weights (`packed`) have no storage; they are no part of a pass.
            if (
                isinstance(leaf, Tensor)
                and leaf.device.type == self.device
                and leaf.layout == torch.strided
            ):
                self.note(leaf)
        alive = self.live + _inside(func, args)
        if alive > self.peak:
            self.peak, self.peak_logits = alive, self.live_logits
        self.logits = max(self.logits, self.live_logits)
        packet = func.overloadpacket
        count = _PRODUCTS.get(packet)
        if count is not None:
            self._count(packet, count(*args, **kwargs, out_val=out), (*args, out))
        return out

    def note(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` as alive, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:  # a view, or written in place
            return
        size = storage.nbytes()
        logits = size if tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary else 0

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size
            self.live_logits -= logits

        # A storage's Python object lives as long as the storage, so this tells when it is freed.
        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.live_logits += logits

    def _count(self, packet: Any, operations: int, tensors: tuple[Any, ...]) -> None:
        if any(isinstance(x, Tensor) and self.vocabulary in x.shape for x in tensors):
            self.operations["head"] += operations
        elif packet in _ATTENTION:
            self.operations["attention"] += operations
        else:
            self.operations["tokens"] += operations


def _inside(func: Any, args: tuple[Any, ...]) -> int:
    """Return the bytes that a kernel allocates, and frees again before it returns.

    bitsandbytes' product with a 4-bit weight writes the weight out in the dtype of the
    activations wherever its fused kernel does not pay, which is most shapes of training.
    """
    if func.name() == "bitsandbytes::gemm_4bit":
        activations, _, (rows, columns) = args[:3]
        return int(rows * columns * activations.element_size())
    return 0
