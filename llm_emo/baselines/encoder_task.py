"""Method `encoder`: a transformers encoder, fine-tuned as a sentence classifier.

A run keeps all that it needs in `adapter/` (`pretrained`).
"""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_emo.baselines import encoder, features, pretrained
from llm_emo.baselines.classifier import Classifier, Encoding, Item
from llm_emo.baselines.kinds import Encoder
from llm_emo.experiment import BaselineExperiment
from llm_emo.types import Row, Split

TOKENS_PER_PASS = 4096
"""Of the pass that features come from, padding included."""


class EncoderClassifier(Classifier):
    """A text encoder with its head and its tokenizer; an item is a row's token ids.

    `encoded` counts the texts that have passed through the encoder for `encode`; what came from
    the cache is not in it.
    """

    model: encoder.Network

    def __init__(
        self, names: Sequence[str], method: Encoder, model: encoder.Network, tokenizer: Any
    ) -> None:
        super().__init__(names, model)
        self.method, self.tokenizer = method, tokenizer
        self.encoded = 0
        self._shortened: dict[Split, int] = {}

    def items(self, rows: Sequence[Row], split: Split, *, augmented: bool) -> list[Item]:
        """Return one item a row, its token ids; nothing is augmented."""
        ids = self._ids(rows, split)
        return [
            Item(own, (self.names.index(row.gold),), (row.utterance.uid,))
            for own, row in zip(ids, rows, strict=True)
        ]

    def batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, both (B, T)."""
        ids, mask = encoder.pad([item.inputs for item in items], self.tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask}

    def scores(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return class scores, shape (B, C)."""
        scores: Tensor = model(**batch)
        return scores

    def save(self, folder: Path) -> None:
        """Write config, tokenizer and weights."""
        pretrained.save(folder, self.model, self.tokenizer)

    def facts(self) -> dict[str, Any]:
        """Return the encoder, its parameters without the head, and the texts that were cut."""
        return {
            "encoder": self.method.name,
            "revision": self.method.revision,
            "encoder_parameters": sum(p.numel() for p in self.model.encoder.parameters()),
            "texts_cut": dict(self._shortened),
        }

    def encode(self, rows: Sequence[Row], split: Split) -> Encoding:
        """Return features (N, F) and class probabilities (N, C) of rows, in their order.

        They are computed once and kept in the cache. Only the rows' texts and uids are read, so
        these may be turns that the protocol does not score.
        """
        ids = self._ids(rows, split)
        uids = [row.utterance.uid for row in rows]
        key = partial(self._key, ids)
        kept = torch.tensor(features.cached(key, uids, lambda: self._extract(ids)))
        width = encoder.width(self.model)
        return Encoding(kept[:, :width], kept[:, width:])

    def _key(self, ids: Sequence[Sequence[int]]) -> features.Key:
        return {
            "kind": f"encoder, {self.method.pooling}",
            "weights": features.fingerprint(self.model),
            # They hold all that a tokenizer decides.
            "input_ids": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        }

    def _extract(self, ids: Sequence[Sequence[int]]) -> encoder.Floats:
        self.encoded += len(ids)
        return encoder.extract(
            self.model, ids, padding=self.tokenizer.pad_token_id, tokens_per_pass=TOKENS_PER_PASS
        )

    def _ids(self, rows: Sequence[Row], split: Split) -> list[list[int]]:
        """Return token ids, and count the texts that lost their end.

        Raises:
            ModelError: the tokenizer is another model's.
        """
        length = self.method.head.max_length
        texts = [row.utterance.text for row in rows]
        ids = encoder.tokenize(self.tokenizer, texts, length)
        encoder.require_known(self.method.name, self.model, self.tokenizer.pad_token_id, ids)
        full = [text for text, own in zip(texts, ids, strict=True) if len(own) == length]
        longer = encoder.tokenize(self.tokenizer, full, length + 1)
        self._shortened[split] = sum(len(own) > length for own in longer)
        return ids


def create(method: Encoder, experiment: BaselineExperiment) -> EncoderClassifier:
    """Return a classifier over a pre-trained encoder; its head is random.

    Raises:
        ModelError: the encoder cannot be used.
        JobFailed: the hub, or the package index, cannot be reached.
    """
    names = experiment.labels.names
    base, tokenizer = encoder.load(
        method.name, method.head, method.pooling, revision=method.revision
    )
    made = encoder.network(base, method.head, method.pooling, classes=len(names))
    return EncoderClassifier(names, method, made, tokenizer)


def load(method: Encoder, experiment: BaselineExperiment, folder: Path) -> EncoderClassifier:
    """Return what `EncoderClassifier.save` wrote into `folder`.

    Raises:
        ModelError: a file is absent, damaged, or belongs to other settings.
    """
    names = experiment.labels.names
    made, tokenizer = pretrained.read(
        encoder.TEXT,
        folder,
        lambda base: encoder.network(base, method.head, method.pooling, classes=len(names)),
    )
    return EncoderClassifier(names, method, made, tokenizer)
