"""How much memory a step takes, found by running it without any numbers.

The program's own training step, scoring pass and generation run on the meta device, and a ledger
writes down what is alive. So there is no formula for activations here, and none to be wrong for
an architecture, an adapter or a version of a library that nobody had in mind: whatever is kept
for the backward pass, cast, dequantised or recomputed is seen.

Letters: N nodes of a trie, K nodes with logits, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llm_emo.lean import log_probabilities
from llm_emo.models.ledger import Footprint
from llm_emo.models.meta import Drawing, Kind, standing_for
from llm_emo.training import Batch, answer_loss
from llm_emo.trie import TokenTrie, TrieDecoder, node_logits

DEPTHS = (2, 3)
"""Layers with which a pass is run instead of all of them, where all layers are alike."""


def _extrapolated(drawing: Drawing, run: Callable[[], Footprint]) -> Footprint:
    """Run with few layers and go on in a straight line: every layer adds the same.

    The last layer is among the few: it may compute less than the others (`decoder_layer`). The
    largest moment is in the last layers or at the logits, with all that the layers below keep; so
    it grows with depth as they do.
    """
    decoder: Any = drawing.base.get_decoder()
    layers = getattr(decoder, "layers", None)
    low, high = DEPTHS
    if layers is None or len(layers) <= high or not _alike(layers):
        return run()
    footprints = []
    try:
        for depth in DEPTHS:
            decoder.layers = nn.ModuleList([*layers[: depth - 1], layers[-1]])
            footprints.append(run())
    finally:
        decoder.layers = layers
    first, second = footprints
    return first.beyond(second, (len(layers) - low) / (high - low))


def _alike(layers: nn.ModuleList) -> bool:
    """Whether all layers have the same parameters; what their masks hide changes no size."""
    kinds = {
        tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        for layer in layers
    }
    return len(kinds) == 1


def training_step(
    drawing: Drawing,
    batch: Batch,
    kind: Kind,
    *,
    checkpointing: bool,
    accumulating: bool,
    whole: bool = False,
) -> Footprint:
    """Run one micro-batch forward and backward.

    Args:
        drawing: The model.
        batch: What `training.collate` made.
        kind: The device that is meant.
        checkpointing: Whether layers are recomputed in the backward pass.
        accumulating: Whether gradients of an earlier micro-batch are there already.
        whole: Run all layers; without it, a few of them where they are alike.
    """
    model, ledger = drawing.model.train(), drawing.ledger
    learning = [p for p in model.parameters() if p.requires_grad]

    def run() -> Footprint:
        with ledger, standing_for(kind):
            ledger.start()
            if accumulating:
                for parameter in learning:
                    parameter.grad = torch.zeros_like(parameter)
            loss = answer_loss(model, batch)
            saved = ledger.since()
            loss.backward()  # type: ignore[no-untyped-call]
        for parameter in learning:
            parameter.grad = None
        return ledger.footprint(saved)

    if checkpointing:  # as the Trainer does it
        drawing.base.activation_checkpointing_enable({"use_reentrant": False})
    try:
        return run() if whole else _extrapolated(drawing, run)
    finally:
        drawing.base.activation_checkpointing_disable()


def scoring_pass(
    drawing: Drawing, trie: TokenTrie, nodes: Tensor, kind: Kind, *, whole: bool = False
) -> Footprint:
    """Run one pass of `inference.score`: log-probabilities of the whole vocabulary at `nodes`.

    But for attention nothing is compiled for tensors without numbers, so it is torch's operations
    that are counted; they hold more.
    """
    model, ledger = drawing.model.eval(), drawing.ledger

    def run() -> Footprint:
        with torch.no_grad(), ledger, standing_for(kind):
            ledger.start()
            logits = node_logits(model, trie, nodes)
            rows = torch.zeros(1, dtype=torch.long, device=logits.device)
            log_probabilities(logits, rows, rows)
            return ledger.footprint()

    return run() if whole else _extrapolated(drawing, run)


def generating_pass(
    drawing: Drawing, trie: TokenTrie, steps: int, kind: Kind, *, whole: bool = False
) -> Footprint:
    """Run one pass of `inference.generate` in which every sequence writes `steps` tokens."""
    model, ledger = drawing.model.eval(), drawing.ledger

    def run() -> Footprint:
        with torch.no_grad(), ledger, standing_for(kind):
            ledger.start()
            decoder = TrieDecoder(model, trie)
            for _ in range(steps - 1):
                decoder.step(decoder.logits.argmax(-1))
            return ledger.footprint()

    return run() if whole else _extrapolated(drawing, run)
