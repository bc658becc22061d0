"""The token trie: every distinct token of a batch, computed once, exactly.

Emotion examples share long beginnings: the instruction, the dialogue so far, the utterance
under k candidate labels. A batch of token sequences becomes a trie whose nodes are numbered
in depth-first order; node n has a token, a depth (its position id) and the half-open interval
[n, exit[n]) of its subtree. Node q may attend to node k exactly when `k <= q < exit[k]`: causal
attention along its own path. One forward pass of shape (1, N) with `position_ids = depth` and
that mask gives every sequence the hidden states that it has when it runs alone, because a
decoder's state at a token depends on nothing but the token's path.

Letters used below: B sequences, L the longest of them, N nodes, T targets, V vocabulary,
C cached nodes, S live sequences of a generation step, A tokens of a cached beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache

from llm_emo import attention, native_attention
from llm_emo.branches import Branches, cheapest
from llm_emo.errors import ModelError


@dataclass(frozen=True)
class TokenTrie:
    """Token sequences folded into a trie.

    `tokens`, `depth` and `exit` have shape (N,). `nodes` has shape (B, L): the node of every
    sequence's every token, -1 behind its end. `lengths` has shape (B,). All are int64 on the
    CPU. Equal sequences share all their nodes; a sequence may be a prefix of another.
    """

    tokens: Tensor
    depth: Tensor
    exit: Tensor
    nodes: Tensor
    lengths: Tensor

    @classmethod
    def build(cls, sequences: Sequence[Sequence[int]]) -> "TokenTrie":
        """Fold `sequences` (B of them, each of at least one token id >= 0) into a trie.

        Raises:
            ValueError: no sequence, or an empty one: it has no node to read a state from.

        >>> trie = TokenTrie.build([(5, 6, 7), (5, 6, 8), (5, 6)])
        >>> trie.tokens.tolist(), trie.depth.tolist(), trie.exit.tolist()
        ([5, 6, 7, 8], [0, 1, 2, 2], [4, 4, 3, 4])
        >>> trie.nodes.tolist()
        [[0, 1, 2], [0, 1, 3], [0, 1, -1]]
        """
        if not sequences or not all(sequences):
            raise ValueError("a token trie needs at least one sequence, and a token in each")
        # In lexicographic order a sequence's new nodes are exactly the tokens behind its common
        # prefix with the sequence before it, and writing them down row by row is a depth-first
        # walk. Everything else follows from that with array operations.
        order = sorted(range(len(sequences)), key=lambda row: tuple(sequences[row]))
        lengths = np.array([len(sequences[row]) for row in order])
        columns = np.arange(lengths.max())
        ids = np.full((len(order), len(columns)), -1)
        for row, source in enumerate(order):
            ids[row, : lengths[row]] = sequences[source]
        inside = columns < lengths[:, None]  # (B, L)

        common = np.zeros(len(order), dtype=np.int64)
        same = (ids[1:] == ids[:-1]) & inside[1:] & inside[:-1]
        common[1:] = np.logical_and.accumulate(same, axis=1).sum(axis=1)
        behind = columns >= common[:, None]  # (B, L): not shared with the row above
        new = behind & inside

        # A shared token's node is the newest one above it in its column.
        numbered = np.where(new, np.cumsum(new).reshape(new.shape) - 1, -1)
        nodes = np.where(inside, np.maximum.accumulate(numbered, axis=0), -1)

        # A subtree ends where a later row leaves the path at or above its depth.
        total = int(new.sum())
        first = np.cumsum(new.sum(axis=1)) - new.sum(axis=1)  # (B,) nodes before each row
        leaves = np.where(behind[1:], first[1:, None], total)
        ends = np.full(new.shape, total)
        ends[:-1] = np.minimum.accumulate(leaves[::-1], axis=0)[::-1]

        unsorted = np.empty_like(nodes)
        unsorted[order] = nodes
        original = np.empty_like(lengths)
        original[order] = lengths
        return cls(
            tokens=torch.from_numpy(ids[new]),
            depth=torch.from_numpy(np.broadcast_to(columns, new.shape)[new]),
            exit=torch.from_numpy(ends[new]),
            nodes=torch.from_numpy(unsorted),
            lengths=torch.from_numpy(original),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def saved(self) -> int:
        """Tokens of the sequences that did not have to be computed."""
        return int(self.lengths.sum()) - len(self)

    @property
    def last(self) -> Tensor:
        """The node of every sequence's last token, shape (B,)."""
        return self.nodes.gather(1, self.lengths[:, None] - 1)[:, 0]

    def allowed(self) -> Tensor:
        """Which node (row) may attend to which (column), shape (N, N), bool."""
        node = torch.arange(len(self))
        return (node <= node[:, None]) & (node[:, None] < self.exit)


def masks_for(model: nn.Module, allowed: Tensor, query: Tensor, key: Tensor) -> Any:
    """Return what `model` takes as a ready-made attention mask.

    Args:
        model: The causal LM, wrapped or not; its config says which layers slide.
        allowed: Who may attend to whom, shape (Q, K), bool.
        query: Depths of the Q nodes.
        key: Depths of the K nodes.

    A prepared 4-D mask reaches every layer as it is, so the sliding window of the layers
    that have one must be in it.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    config = inner.config.get_text_config()  # type: ignore[union-attr, operator]
    full = allowed[None, None]
    sliding = full
    if _slides(config, query):
        sliding = (allowed & (query[:, None] - key < config.sliding_window))[None, None]
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return sliding
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(
            f"{config.model_type}: layers of kind {', '.join(sorted(unknown))} are not attention "
            "over a token's own path, so the token trie does not hold for them; "
            "take a model with full or sliding-window attention"
        )
    return {kind: sliding if kind == "sliding_attention" else full for kind in kinds}


@dataclass(frozen=True)
class Beginning:
    """What tokens in front of a trie's sequences leave for them to attend to.

    `layers` holds keys and values of every layer, each of shape (1, key-value heads, A, D).
    """

    length: int
    layers: tuple[tuple[Tensor, Tensor], ...]

    def cache(self) -> DynamicCache:
        """Return a cache that starts with these tokens; it grows by copying, never in place."""
        return DynamicCache(self.layers)


def begin(model: nn.Module, ids: Sequence[int]) -> Beginning | None:
    """Run the A tokens that many tries begin with; None where the model keeps no cache of them."""
    device = next(model.parameters()).device
    trie = TokenTrie.build([ids])
    allowed, depth, _ = _behind(trie, None, device)
    cache = DynamicCache()
    model(
        input_ids=trie.tokens.to(device)[None],
        position_ids=depth[None],
        attention_mask=masks_for(model, allowed, depth, depth),
        logits_to_keep=trie.last.to(device),
        past_key_values=cache,
        use_cache=True,
    )
    layers = tuple((layer.keys, layer.values) for layer in cache.layers)
    if not layers or any(keys is None or keys.shape[2] != len(ids) for keys, _ in layers):
        return None
    return Beginning(len(ids), layers)


def _behind(
    trie: TokenTrie, beginning: Beginning | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return who may attend to whom, shape (N, A + N), and depths of queries and of keys."""
    allowed, depth = trie.allowed().to(device), trie.depth.to(device)
    if beginning is None:
        return allowed, depth, depth
    depth = depth + beginning.length
    keys = torch.cat([torch.arange(beginning.length, device=device), depth])
    return nn.functional.pad(allowed, (beginning.length, 0), value=True), depth, keys


def node_logits(
    model: nn.Module,
    trie: TokenTrie,
    nodes: Tensor,
    beginning: Beginning | None = None,
    *,
    whole: bool = False,
) -> Tensor:
    """Run one pass over `trie` and return the next-token logits at `nodes`, shape (T, V).

    The head is applied at those nodes only: with a vocabulary of 50,000 and three trained
    tokens a row, logits at all N nodes would cost more than the transformer.

    Args:
        model: The causal LM, wrapped or not.
        trie: The sequences, without what they all begin with.
        nodes: Where logits are asked for, shape (T,).
        beginning: What they all begin with, run before.
        whole: Whether attention has to go by the dense mask.
    """
    device = next(model.parameters()).device
    allowed, depth, keys = _behind(trie, beginning, device)
    seen = {"attention_mask": masks_for(model, allowed, depth, keys)} if whole else None
    output = model(
        input_ids=trie.tokens.to(device)[None],
        position_ids=depth[None],
        **(seen or _visible(model, trie, nodes, allowed, depth, keys)),
        logits_to_keep=nodes.to(device),
        past_key_values=None if beginning is None else beginning.cache(),
        use_cache=beginning is not None,
    )
    return output.logits[0]  # type: ignore[no-any-return]


def _visible(
    model: nn.Module, trie: TokenTrie, nodes: Tensor, allowed: Tensor, query: Tensor, key: Tensor
) -> dict[str, Any]:
    """Return the arguments that say which node attends to which: a mask, or the trie's pieces.

    On a GPU a dense mask is one kernel's work; on a CPU the pieces are fewer operations.

    Beside pieces stands `read`: the nodes whose logits are asked for, sorted, each once. A layer
    may return zeros as the last states of all others.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    config = inner.config.get_text_config()  # type: ignore[union-attr, operator]
    # What stands in front of all nodes: a beginning's columns, and a prefix's.
    front = len(key) - len(trie) + int(getattr(inner, "prefix_length", 0))
    if (
        _in_pieces(allowed.device)
        and config._attn_implementation == attention.NAME
        and getattr(config, "attn_logit_softcapping", None) is None
        and not (inner.training and any(getattr(config, name, 0) for name in _DROPOUTS))
        and getattr(config, "v_head_dim", None) is None  # values of another width than keys
        # Asked of the trie's own depths, which are numbers on every device.
        and not _slides(config, trie.depth + (len(key) - len(trie)))
        and (pieces := _cut(model, trie, front)) is not None
    ):
        unread = masks_for(model, allowed[:1, :1], query[:1], key[:1])
        return {
            "attention_mask": unread,
            "branches": pieces,
            "read": torch.unique(nodes).to(allowed.device),
        }
    return {"attention_mask": masks_for(model, allowed, query, key)}


def _cut(model: nn.Module, trie: TokenTrie, front: int) -> Branches | None:
    """Return the trie's pieces, or None where the dense mask serves as well, or SDPA better.

    While gradients are kept, what the pieces cost is too, so a large pass is left to SDPA.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    config = inner.config.get_text_config()  # type: ignore[union-attr, operator]
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    copied = None
    if not native_attention.attends_in(next(model.parameters()).dtype, size):
        # Of a key and a value, which are 2D numbers for the F heads that share them: D / 2F scores.
        # A score, which is written, masked, normalised and multiplied, costs as copying four does.
        copied = size * (getattr(config, "num_key_value_heads", None) or heads) / heads / 2
    cut = cheapest(trie.exit, trie.depth, front=front, copied=copied)
    most = attention.KEPT_SCORES if torch.is_grad_enabled() else attention.PASSING_SCORES
    return cut if cut is not None and cut.cost(front, copied) <= most else None


_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""What configs call dropout inside attention."""


def _in_pieces(device: torch.device) -> bool:
    return device.type == "cpu"


def _slides(config: Any, query: Tensor) -> bool:
    """Whether some layer's window is too narrow for queries at these depths."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return False
    # Depths without numbers: a mask is as large with a window as without.
    return query.is_meta or bool(query.max() >= window)


class TrieDecoder:
    """Greedy decoding of many sequences over one shared cache.

    The trie's nodes fill the cache once; afterwards every live sequence adds one node a step,
    which attends to its own path only. A sequence that ends simply adds no more nodes.
    """

    def __init__(
        self, model: nn.Module, trie: TokenTrie, beginning: Beginning | None = None
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        # Given no config, every layer keeps all nodes: a window over cache columns would be
        # a window over nodes, not over positions; `masks_for` slides by depth instead.
        self.cache = DynamicCache() if beginning is None else beginning.cache()
        allowed, depth, self.depth = _behind(trie, beginning, self.device)  # the last: (C,)
        self.visible = allowed[trie.last.to(self.device)]  # (S, C)
        self.next_depth = depth[trie.last.to(self.device)] + 1  # (S,)
        output = model(
            input_ids=trie.tokens.to(self.device)[None],
            position_ids=depth[None],
            **_visible(model, trie, trie.last, allowed, depth, self.depth),
            logits_to_keep=trie.last.to(self.device),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits: Tensor = output.logits[0]  # (S, V)

    def keep(self, rows: Tensor) -> None:
        """Go on with these live sequences only; `rows` has shape (S', ) of positions."""
        self.visible = self.visible[rows]
        self.next_depth = self.next_depth[rows]
        self.logits = self.logits[rows]

    def step(self, tokens: Tensor) -> None:
        """Append one token to every live sequence, shape (S,), and compute the next logits."""
        count = len(tokens)
        own = torch.eye(count, dtype=torch.bool, device=self.device)
        self.visible = torch.cat([self.visible, own], dim=1)  # (S, C + S)
        self.depth = torch.cat([self.depth, self.next_depth])
        output = self.model(
            input_ids=tokens[None],
            position_ids=self.next_depth[None],
            attention_mask=masks_for(self.model, self.visible, self.next_depth, self.depth),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.next_depth = self.next_depth + 1
        self.logits = output.logits[0]  # (S, V)


@torch.inference_mode()
def verify(model: nn.Module) -> float:
    """Run short sequences through a trie and some alone; return the largest relative difference.

    Some architectures ignore `position_ids` or a prepared 4-D mask (ALiBi, recurrent layers).
    They would train on wrong states without a word, so every model is asked once.

    Raises:
        ModelError: the difference is beyond rounding.
    """
    model.eval()
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    device, front = next(model.parameters()).device, int(getattr(model, "prefix_length", 0))
    # Four tokens, and branches of twelve: as many as it takes to be cut where passes are.
    for count in (4, 8, 16, 32, 64):
        ids = [(7 * place + 3) % config.vocab_size for place in range(4 + 12 * count)]
        sequences = [ids[:4] + ids[start : start + 12] for start in range(4, len(ids), 12)]
        trie = TokenTrie.build(sequences)
        if not _in_pieces(device) or _cut(model, trie, front) is not None:
            break
    rows = range(0, count, count // 4)
    # Alone by the mask: what is wrong in pieces must not be wrong on both sides.
    tries = [TokenTrie.build([sequences[row]]) for row in rows]
    alone = [node_logits(model, one, one.last, whole=True)[0].float() for one in tries]

    def apart(whole: bool) -> float:
        together = node_logits(model, trie, trie.last, whole=whole).float()
        pairs = zip(together[list(rows)], alone, strict=True)
        # Not a number if one of them is not.
        return float(torch.stack([(one - own).norm() / own.norm() for one, own in pairs]).max())

    worst, dtype = apart(whole=False), next(model.parameters()).dtype
    bound = 1e-3 if dtype == torch.float32 else 0.1
    if worst <= bound:
        return worst
    reason = (
        "the architecture does not follow position_ids and a 4-D attention mask, so it cannot be "
        "used here"
    )
    if apart(whole=True) <= bound:
        reason = (
            "by the dense mask they agree, so it is this program's attention in pieces that is "
            "wrong; try again with LLM_EMO_NATIVE=0 in the environment, and please report it"
        )
    raise ModelError(
        f"{model.config.model_type}: logits through the token trie differ by "  # type: ignore[union-attr]
        f"{worst:.2g} (relative) from those of a sequence alone; {reason}"
    )
