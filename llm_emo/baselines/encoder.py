"""Stage 1 of paper 000: an encoder as sentence classifier, and the features that it gives.

Section 3.1: an utterance is [CLS] u_1 ... u_N; its feature vector is the concatenation of the
activations of the last four layers at [CLS], 4 x 1024 = 4096 for roberta-large. Any encoder of
transformers will do that puts a classification token in front. Where the paper is silent:

- The classification head is RoBERTa's own: dropout, dense, tanh, dropout, linear, over the last
  layer at [CLS].
- The four layers are joined in their order, the last one last.
- [SEP] stands behind the utterance, as every such tokenizer puts it; what a user writes is never
  read as a control token.
- A pooler, which some checkpoints have beyond their last layer, is left away: it would be
  parameters without a gradient.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from llm_emo.baselines import minilm
from llm_emo.baselines.settings import EncoderSettings
from llm_emo.errors import JobFailed, ModelError

Floats = np.typing.NDArray[np.float32]

LAYERS = 4
"""Layers whose [CLS] is part of the features."""


class SentenceClassifier(nn.Module):
    """An encoder with a classification head; logits from `forward`, features from `features`.

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
        last = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        first = self.dense(self.dropout(last[:, 0])).tanh()  # (B, H)
        logits: Tensor = self.output(self.dropout(first))
        return logits

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return [CLS] of the last four layers, shape (B, 4H)."""
        states = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
        ).hidden_states
        return torch.cat([state[:, 0] for state in states[-LAYERS:]], dim=1)


def load(
    name: str, settings: EncoderSettings, *, classes: int, revision: str | None = None
) -> tuple[SentenceClassifier, Any]:
    """Return a classifier over a pre-trained encoder, its head still random, and the tokenizer.

    Args:
        name: `minilm-l6` (bundled), a local folder, or with `revision` a Hugging Face id.
        settings: of the head, and the length that texts are cut to.
        classes: C.
        revision: commit or tag of a Hugging Face id.

    Raises:
        ModelError: absent, unreadable, or no encoder that these features can be taken from.
        JobFailed: the hub, or the package index, cannot be reached.
    """
    source = str(minilm.folder()) if name == minilm.NAME else name
    if revision is None and not (Path(source) / "config.json").is_file():
        raise ModelError(
            f"{name!r} is no folder with a config.json; name a local encoder, {minilm.NAME!r} "
            "(bundled), or a Hugging Face id with its revision"
        )
    where: dict[str, Any] = {"trust_remote_code": False}
    where |= {"local_files_only": True} if revision is None else {"revision": revision}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        # A pickled checkpoint is code.
        encoder = AutoModel.from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, **where
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())[:400]
        if revision is not None and ("connect" in text or "offline" in text):
            raise JobFailed(
                f"{name}: the Hugging Face hub cannot be reached; download the encoder elsewhere "
                "and name its folder"
            ) from error
        raise ModelError(f"{name}: cannot be loaded as an encoder: {text}") from error
    require_features(name, encoder, tokenizer, settings)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return SentenceClassifier(encoder, settings, classes), tokenizer


def require_features(
    name: str, encoder: PreTrainedModel, tokenizer: Any, settings: EncoderSettings
) -> None:
    """Hold that the encoder has the layers, the classification token and the length.

    Raises:
        ModelError: it has not.
    """
    layers = getattr(encoder.config, "num_hidden_layers", 0)
    if layers < LAYERS:
        raise ModelError(
            f"{name}: has {layers} layers; the features are taken from the last {LAYERS}"
        )
    first = tokenizer("a")["input_ids"][0]
    if tokenizer.cls_token_id is None or first != tokenizer.cls_token_id:
        raise ModelError(
            f"{name}: its tokenizer puts no classification token in front of a text; take an "
            "encoder such as BERT, RoBERTa, ELECTRA or DeBERTa"
        )
    if settings.max_length > tokenizer.model_max_length:
        raise ModelError(
            f"{name}: max_length is {settings.max_length}, but it reads at most "
            f"{tokenizer.model_max_length} tokens"
        )


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Return the token ids of every text, [CLS] first; the end of what is too long is cut."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        list(texts), truncation=True, max_length=max_length, split_special_tokens=True
    )["input_ids"]
    return ids


def pad(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Return token ids and their mask, both of shape (B, longest row), padded on the right."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(longest) < lengths[:, None]).long()


def extract(
    model: SentenceClassifier,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int,
    tokens_per_pass: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Floats:
    """Return the features of every text, shape (N, 4H), float32, in the texts' order.

    Texts of like length share a pass, so little is computed on padding.

    Args:
        model: left in eval mode.
        tokenizer: of the encoder.
        texts: N of them.
        max_length: tokens that a text is cut to.
        tokens_per_pass: of a batch, padding included; changes memory, not the result.
        progress: called with the rows of every pass.
    """
    rows = tokenize(tokenizer, texts, max_length)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    width = LAYERS * model.encoder.config.hidden_size
    found = np.empty((len(rows), width), dtype=np.float32)
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for batch in _passes(order, [len(row) for row in rows], tokens_per_pass):
            ids, mask = pad([rows[row] for row in batch], tokenizer.pad_token_id)
            features = model.features(ids.to(device), mask.to(device))
            found[batch] = features.float().cpu().numpy()
            progress(len(batch))
    return found


def _passes(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows, sorted by length, into batches of at most `budget` tokens with their padding."""
    passes: list[list[int]] = []
    for row in order:
        if passes and (len(passes[-1]) + 1) * lengths[row] <= budget:
            passes[-1].append(row)
        else:
            passes.append([row])
    return passes
