"""TextCNN: one convolution over the word vectors of a text (paper 001, section 5).

    x_emb     = Embedding(ids)                   (B, L, D)
    x_conv_i  = Conv1d(x_emb)                    (B, F, W), one for each filter width
    x_pool_i  = Pool(ReLU(x_conv_i))             (B, F)
    logits    = W_fc Dropout(concat(x_pool_i))   (B, C)

Where the report is silent or contradicts itself:

- Its formula has dropout around W_fc x_fc, which would drop class scores; the model that it
  follows (Kim 2014) drops pooled features, and so does this one.
- The report pads every text to the longest of the corpus. Here W counts the windows that begin at
  a word of the text, zeros standing behind its end: ceil(words / stride). So a text's logits do
  not depend on what it is batched with, every word is seen by some window wherever the stride
  is no longer than the filter, and no test text is cut.
- A text without words is one window of zeros.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llm_emo.baselines.settings import TextCnnSettings
from llm_emo.baselines.vectors import PADDING


class TextCnn(nn.Module):
    """Words to class scores.

    Args:
        settings: filters, pooling, dropout.
        words: ids of the vocabulary.
        dimensions: of a word vector, D.
        classes: C.
    """

    def __init__(
        self, settings: TextCnnSettings, *, words: int, dimensions: int, classes: int
    ) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(words, dimensions, padding_idx=PADDING)
        self.embedding.weight.requires_grad_(settings.train_vectors)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(dimensions, settings.filters, size, settings.stride)
            for size in settings.sizes
        )
        self.dropout = nn.Dropout(settings.dropout)
        self.output = nn.Linear(settings.filters * len(settings.sizes), classes)

    def start_from(self, vectors: Tensor) -> None:
        """Copy pre-trained vectors, shape (ids, D), into the embedding; padding becomes zeros."""
        with torch.no_grad():
            self.embedding.weight.copy_(vectors)
            self.embedding.weight[PADDING] = 0

    def forward(self, ids: Tensor) -> Tensor:
        """Return the class scores, shape (B, C), of texts, shape (B, L), padded on the right."""
        logits: Tensor = self.output(self.dropout(self.features(ids)))
        return logits

    def features(self, ids: Tensor) -> Tensor:
        """Return what the filters found in texts, shape (B, filters of all sizes)."""
        lengths = (ids != PADDING).sum(1).clamp(min=1)  # (B,)
        vectors = self.embedding(ids).transpose(1, 2)  # (B, D, L)
        pooled = [
            self._pool(convolution, size, vectors, lengths)
            for convolution, size in zip(self.convolutions, self.settings.sizes, strict=True)
        ]
        return torch.cat(pooled, 1)

    def _pool(self, convolution: nn.Module, size: int, vectors: Tensor, lengths: Tensor) -> Tensor:
        """Return one number per filter, shape (B, F)."""
        found: Tensor = convolution(nn.functional.pad(vectors, (0, size - 1))).relu()  # (B, F, W)
        stride = self.settings.stride
        windows = (lengths + stride - 1) // stride  # (B,)
        beyond = torch.arange(found.shape[2], device=found.device) >= windows[:, None]  # (B, W)
        # After ReLU nothing is below zero, so zeros take part neither in a maximum nor in a sum.
        found = found.masked_fill(beyond[:, None], 0)
        match self.settings.pooling:
            case "max":
                return found.amax(2)
            case "mean":
                return found.sum(2) / windows[:, None]


def pad(texts: Sequence[Sequence[int]]) -> Tensor:
    """Return encoded texts as one batch, shape (B, longest text, at least 1)."""
    longest = max(1, *(len(text) for text in texts))
    return torch.tensor([[*text, *[PADDING] * (longest - len(text))] for text in texts])
