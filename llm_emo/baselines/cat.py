"""CAT: a CNN and an LSTM beside each other, each attending to the other; and what it is made of.

Paper: He, Minematsu and Saito, "Effective Integration of Transformer for Network-based Speech
Emotion Recognition", section 2.3, figure 2, table 2; equation numbers are its.

    log-mel --+--> CNN (5) -----------------> H_C (B, K, D) --+--> queries H_C, context H_L --+
    (B, T, 40)|                                               |                               |
              +--> conv over time -> Bi-LSTM -> H_L (B, S, D) +--> queries H_L, context H_C --+
                   (6-8)                                                                      |
    logits (B, classes) <- linear <- added <- mean over time of each (1, 2) <-----------------+

`structure` is "cat"; "cnn_to_lstm" or "lstm_to_cnn", which keep one of the two transformers (the
first queries from the CNN); "cnn_plus_lstm", which adds both means without any transformer; or
"lstm_transformer", a transformer on the LSTM alone. Table 2's CNN-transformer is in `ilt`.

Where the paper is silent:

- K and S differ, so the outputs are added after each is averaged over its valid steps.
- The convolution before the LSTM has windows side by side and a ReLU; in the shipped recipes, of 8
  frames and with 128 filters.
- The LSTM has D / 2 units in each direction, D being the CNN's features.
- Positional encoding is off in the shipped recipes: ILT's finding is that an LSTM takes its place.
  On, it is added to both sequences.
- One linear layer maps the sum to the classes; the softmax belongs to the loss.
- Sizes of the CNN and the transformers: see `acoustic`.
- Padding: the paper masks nothing (`mask: false`); the shipped recipes mask it.
"""

import torch
from torch import Tensor, nn

from llm_emo.baselines.acoustic import (
    BiLstm,
    Cnn,
    Standardise,
    Transformer,
    mean_over_time,
    positions,
)
from llm_emo.baselines.audio import MELS
from llm_emo.baselines.speech_settings import CatSettings


class Shorten(nn.Module):
    """A convolution over time whose windows stand side by side, and a ReLU.

    Frames at the end that fill no window fall away; a clip shorter than one window is padded.
    Steps beyond a row's own are whatever they are: the LSTM after it does not read them.
    """

    def __init__(self, mels: int, filters: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.convolution = nn.Conv1d(mels, filters, window, stride=window)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, T, M), zero beyond `lengths`, to (B, S, filters) and the steps of each row."""
        missing = self.window - x.shape[1]
        if missing > 0:
            x = nn.functional.pad(x, (0, 0, 0, missing))
        steps = lengths.clamp(min=self.window) // self.window
        return torch.relu(self.convolution(x.transpose(1, 2))).transpose(1, 2), steps


class Cat(nn.Module):
    """The network of `CatSettings`."""

    def __init__(self, settings: CatSettings, classes: int) -> None:
        super().__init__()
        self.settings = settings
        structure = settings.structure
        self.standardise = Standardise(MELS)
        cnn = Cnn(MELS, settings.cnn)
        size = cnn.size
        if structure != "lstm_transformer":
            self.cnn = cnn
        self.shorten = Shorten(MELS, settings.filters, settings.window)
        self.lstm = BiLstm(settings.filters, size // 2)
        if structure in ("cat", "cnn_to_lstm"):
            self.cnn_to_lstm = Transformer(size, settings.transformer)
        if structure in ("cat", "lstm_to_cnn"):
            self.lstm_to_cnn = Transformer(size, settings.transformer)
        if structure == "lstm_transformer":
            self.transformer = Transformer(size, settings.transformer)
        self.classify = nn.Linear(size, classes)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Map log-mels (B, T, M) with (B,) valid frames to logits (B, classes)."""
        logits: Tensor = self.classify(self.encode(features, lengths))
        return logits

    def encode(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Return the sum from which the last layer makes logits; shape (B, D)."""
        if not self.settings.mask:
            lengths = torch.full_like(lengths, features.shape[1])
        x = self.standardise(features, lengths)
        shortened, after_lstm = self.shorten(x, lengths)
        h_l = self._located(self.lstm(shortened, after_lstm))
        structure = self.settings.structure
        if structure == "lstm_transformer":
            return mean_over_time(self.transformer(h_l, None, after_lstm), after_lstm)
        h_c, after_cnn = self.cnn(x, lengths)
        h_c = self._located(h_c)
        parts = []
        if structure == "cnn_plus_lstm":
            parts = [mean_over_time(h_c, after_cnn), mean_over_time(h_l, after_lstm)]
        if structure in ("cat", "cnn_to_lstm"):
            parts.append(mean_over_time(self.cnn_to_lstm(h_c, h_l, after_lstm), after_cnn))
        if structure in ("cat", "lstm_to_cnn"):
            parts.append(mean_over_time(self.lstm_to_cnn(h_l, h_c, after_cnn), after_lstm))
        return torch.stack(parts).sum(0)

    def _located(self, x: Tensor) -> Tensor:
        if not self.settings.positional_encoding:
            return x
        return x + positions(x.shape[1], x.shape[2], x.device)
