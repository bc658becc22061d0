"""Text encoders as sentence classifiers, and the features that they give.

`first`, stage 1 of paper 000, section 3.1: an utterance is [CLS] u_1 ... u_N; its feature vector is
the concatenation of the activations of the last four layers at [CLS], 4 x 1024 = 4096 for
roberta-large. `mean`, pipeline 2 of paper 002: its feature vector is the mean of the last layer
over its tokens, and one linear layer gives the classes. Any encoder of transformers will do that
puts a classification token in front. Where the papers are silent:

- The classification head of `first` is RoBERTa's own: dropout, dense, tanh, dropout, linear, over
  the last layer at [CLS].
- The four layers are joined in their order, the last one last.
- [SEP] stands behind the utterance, as every such tokenizer puts it; what a user writes is never
  read as a control token.
- A pooler, which some checkpoints have beyond their last layer, is left away: it would be
  parameters without a gradient.
- Decoders are refused, and so are encoders that come with one (T5, BART). In front of a text, a
  decoder's state has seen none of it; method `lora` is theirs.

Letters: B texts, T tokens, H hidden units, F features (4H or H), C classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from llm_emo.baselines import minilm, pretrained
from llm_emo.baselines.acoustic import mean_over_time
from llm_emo.baselines.settings import EncoderSettings
from llm_emo.errors import ModelError
from llm_emo.models import facts

Floats = np.typing.NDArray[np.float32]

Pooling = Literal["first", "mean"]

LAYERS = 4
"""Layers whose [CLS] is part of the features."""

SUCH_AS = "encoder such as BERT, RoBERTa, ELECTRA or DeBERTa"
"""What to take instead."""

ROWS = 8
"""Texts of like length that run together on a CPU."""


class FirstClassifier(nn.Module):
    """An encoder, and RoBERTa's classification head over its classification token.

    Args:
        encoder: of H hidden units and at least four layers.
        settings: dropout of the head.
        classes: C.
    """

    def __init__(self, encoder: PreTrainedModel, settings: EncoderSettings, classes: int) -> None:
        super().__init__()
        hidden = encoder.config.hidden_size
        self.encoder = encoder
        self.dense = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(settings.dropout)
        self.output = nn.Linear(hidden, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the class scores, shape (B, C), of token ids and their mask, shape (B, T)."""
        first = by_length(
            lambda ids, mask: self.encoder(input_ids=ids, attention_mask=mask)[0][:, 0],
            input_ids,
            attention_mask,
        )
        return self._classes(first)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return [CLS] of the last four layers, shape (B, 4H), and the class scores, (B, C)."""
        states = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
        ).hidden_states
        features = torch.cat([state[:, 0] for state in states[-LAYERS:]], dim=1)
        return features, self._classes(states[-1][:, 0])

    def _classes(self, first: Tensor) -> Tensor:
        logits: Tensor = self.output(self.dropout(self.dense(self.dropout(first)).tanh()))
        return logits


class MeanClassifier(nn.Module):
    """An encoder, the mean of its last layer over a text's tokens, and one linear layer.

    Args: as `FirstClassifier`.
    """

    def __init__(self, encoder: PreTrainedModel, settings: EncoderSettings, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(settings.dropout)
        self.output = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the class scores, shape (B, C), of token ids and their mask, shape (B, T)."""
        logits: Tensor = self.output(self.dropout(by_length(self._mean, input_ids, attention_mask)))
        return logits

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean over the tokens, shape (B, H), and the class scores, (B, C)."""
        features = self._mean(input_ids, attention_mask)
        return features, self.output(self.dropout(features))

    def _mean(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        return mean_over_time(states, attention_mask.sum(1))


def by_length(run: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """Return what `run` gives for token ids and their mask, shape (B, H), in the rows' order.

    On a CPU, where time is tokens, texts of like length run together, few at a time: of 32 lines
    of a dialogue drawn at random, more than half of a batch is padding.
    """
    if ids.is_cuda or len(ids) <= ROWS:
        return run(ids, mask)
    lengths = mask.sum(1)
    order = lengths.argsort()
    parts = [
        run(ids[rows, :longest], mask[rows, :longest])
        for rows in torch.split(order, ROWS)
        for longest in [int(lengths[rows[-1]])]
    ]
    return torch.cat(parts)[order.argsort()]


Network = FirstClassifier | MeanClassifier


def network(
    encoder: PreTrainedModel, settings: EncoderSettings, pooling: Pooling, *, classes: int
) -> Network:
    """Return a classifier over an encoder, whose pooler, if it has one, goes; its head is random.

    Args:
        encoder: of H hidden units.
        settings: of the head.
        pooling: what stands for a text.
        classes: C.
    """
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    make = FirstClassifier if pooling == "first" else MeanClassifier
    return make(encoder, settings, classes)


def _alone(name: str, config: PreTrainedConfig) -> None:
    """Refuse an encoder that comes with a decoder."""
    if config.is_encoder_decoder:
        raise ModelError(
            f"{name}: a model of type {config.model_type} is an encoder with a decoder behind it; "
            f"expected an encoder alone; take an {SUCH_AS}"
        )


TEXT = pretrained.Kind(
    what="an encoder",
    names=f"a local encoder, {minilm.NAME!r} (bundled)",
    front=AutoTokenizer,
    spare="pooler",
    settle=_alone,
)


def load(
    name: str, settings: EncoderSettings, pooling: Pooling, *, revision: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Return a pre-trained encoder and its tokenizer.

    Args:
        name: `minilm-l6` (bundled), a local folder, or with `revision` a Hugging Face id.
        settings: the length that texts are cut to.
        pooling: what stands for a text.
        revision: commit or tag of a Hugging Face id.

    Raises:
        ModelError: absent, unreadable, or no encoder that these features can be taken from.
        JobFailed: the hub, or the package index, cannot be reached.
    """
    source = str(minilm.folder()) if name == minilm.NAME else name
    encoder, tokenizer = pretrained.load(TEXT, name, revision, source=source)
    require_whole_texts(name, encoder)
    require_features(name, encoder, tokenizer, settings, pooling)
    return encoder, tokenizer


def require_features(
    name: str, encoder: PreTrainedModel, tokenizer: Any, settings: EncoderSettings, pooling: Pooling
) -> None:
    """Hold that the encoder has the length and a padding, and for `first` the layers and the token.

    Raises:
        ModelError: it has not.
    """
    layers = getattr(encoder.config, "num_hidden_layers", 0)
    if pooling == "first" and layers < LAYERS:
        raise ModelError(
            f"{name}: has {layers} layers; the features are taken from the last {LAYERS}"
        )
    first = tokenizer("a")["input_ids"][:1]
    if pooling == "first" and (tokenizer.cls_token_id is None or first != [tokenizer.cls_token_id]):
        raise ModelError(
            f"{name}: its tokenizer puts no classification token in front of a text; take an "
            f"{SUCH_AS}, or pooling mean"
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"{name}: its tokenizer has no padding token, and the texts of a step have other "
            f"lengths; name one of its tokens as pad_token in tokenizer_config.json, or take an "
            f"{SUCH_AS}"
        )
    longest = min(tokenizer.model_max_length, positions(encoder))
    if settings.max_length > longest:
        raise ModelError(
            f"{name}: method.head.max_length is {settings.max_length}, but it reads at most "
            f"{longest} tokens; lower it, or take an encoder of longer texts"
        )


def positions(encoder: PreTrainedModel) -> float:
    """Return the tokens of the longest text that an encoder has positions for.

    A table of absolute positions decides; RoBERTa's and its kin's begins behind the padding id,
    so that 514 rows are 512 positions. DeBERTa mostly has none: its positions are relative, far
    ones count as the farthest that it knows, and it reads texts of any length. For what has
    neither (rotary positions), what its config says is what it has learned.
    """
    tables = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in encoder.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    if tables:
        return min(tables)
    if getattr(encoder.config, "relative_attention", False):
        return math.inf
    said: int = getattr(encoder.config, "max_position_embeddings", -1)
    return said if said > 0 else math.inf  # XLNet, which has no limit, says -1


def require_whole_texts(name: str, encoder: PreTrainedModel) -> None:
    """Hold that a model maps a text to a state for each token: of the whole text, and of it alone.

    Asked of the model, not of its name or config: each architecture writes down something else.

    Raises:
        ModelError: it does not.
    """
    kind = type(encoder).__name__
    # Two texts that differ in their last token; the same two when that is padding.
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]] * 2)
    mask = torch.tensor([[1, 1, 1]] * 2 + [[1, 1, 0]] * 2)
    try:
        with torch.inference_mode():
            states = encoder(input_ids=ids, attention_mask=mask)[0]
        fits = states.shape == (*ids.shape, encoder.config.hidden_size)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        text = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{name}: {kind} cannot be run on token ids and their mask ({text}); take an {SUCH_AS}"
        ) from error
    if not fits:
        raise ModelError(
            f"{name}: {kind} gives {tuple(states.shape)} for 4 texts of 3 tokens; expected a state "
            f"of {encoder.config.hidden_size} units for each; take an {SUCH_AS}"
        )
    if torch.equal(states[0, 0], states[1, 0]):
        raise ModelError(
            f"{name}: {kind} is a decoder, in which a token knows only those in front of it; "
            f"expected an encoder; take an {SUCH_AS}, or adapt it with method lora"
        )
    if not torch.allclose(states[2, :2], states[3, :2], atol=1e-4, rtol=1e-3):
        raise ModelError(
            f"{name}: {kind} reads padding as text, so that what it says of a text would depend on "
            f"the texts beside it; take an {SUCH_AS}"
        )


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Return the token ids of every text, [CLS] first; the end of what is too long is cut."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        list(texts), truncation=True, max_length=max_length, split_special_tokens=True
    )["input_ids"]
    return ids


def require_known(name: str, model: Network, padding: int, rows: Sequence[Sequence[int]]) -> None:
    """Hold that the encoder has an embedding for every token of these texts, and for padding.

    Raises:
        ModelError: it has not.
    """
    words = model.encoder.get_input_embeddings().num_embeddings
    facts.require_ids(name, words, max((max(row, default=0) for row in rows), default=0))
    facts.require_ids(name, words, padding)


def pad(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Return token ids and their mask, both of shape (B, longest row), padded on the right."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(longest) < lengths[:, None]).long()


def extract(
    model: Network,
    rows: Sequence[Sequence[int]],
    *,
    padding: int,
    tokens_per_pass: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Floats:
    """Return features and class probabilities, shape (N, F + C), float32, in the rows' order.

    Rows of like length share a pass, so little is computed on padding.

    Args:
        model: left in eval mode.
        rows: token ids of N texts.
        padding: the token id that fills a batch up.
        tokens_per_pass: of a batch, padding included; changes memory, not the result.
        progress: called with the rows of every pass.
    """
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    found = np.empty((len(rows), width(model) + model.output.out_features), dtype=np.float32)
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for batch in _passes(order, [len(row) for row in rows], tokens_per_pass):
            ids, mask = pad([rows[row] for row in batch], padding)
            features, scores = model.encode(ids.to(device), mask.to(device))
            whole = torch.cat([features.float(), scores.float().softmax(1)], dim=1)
            found[batch] = whole.cpu().numpy()
            progress(len(batch))
    return found


def width(model: Network) -> int:
    """Return the features of a text, F."""
    hidden: int = model.encoder.config.hidden_size
    return LAYERS * hidden if isinstance(model, FirstClassifier) else hidden


def _passes(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows, sorted by length, into batches of at most `budget` tokens with their padding."""
    passes: list[list[int]] = []
    for row in order:
        if passes and (len(passes[-1]) + 1) * lengths[row] <= budget:
            passes[-1].append(row)
        else:
            passes.append([row])
    return passes
