"""ILT: an LSTM and a transformer side by side on a CNN, and the two baselines in cascade.

Paper: He, Minematsu and Saito, "Effective Integration of Transformer for Network-based Speech
Emotion Recognition", sections 2.2 and 3.3, figure 1, table 1.

    log-mel (B, T, 40) -> CNN (5) -> C (B, K, D) --+--> Bi-LSTM (6-8) -> attention (9, 10) -+
                                                   |                                        |
                                                   +--> [+ positions (3, 4)] -> transformer |
                                                        (1, 2, 11) -> mean over time -------+
                                                                                            |
    logits (B, classes) <- linear <- concatenation (12), sum (13) or trainable sum (14-16) <-+

`structure` is "ilt", or a baseline: "cnn_transformer" is figure 1 without its LSTM, and in
"cnn_lstm_transformer" the LSTM stands between CNN and transformer.

Where the paper is silent:

- O_trans has to be one vector as O_LSTM is one: it is the mean over the valid steps.
- Both sums need equal sizes: the LSTM has D / 2 units in each direction.
- alpha in equation 13 is 0.5 in the shipped recipes. W_A and W_B are two numbers that start equal.
- One linear layer maps O_final to the classes; the softmax belongs to the loss.
- Sizes of the CNN and the transformer: see `acoustic`.
- Padding: the paper masks nothing (`mask: false`); the shipped recipes mask it.
"""

import torch
from torch import Tensor, nn

from llm_emo.baselines.acoustic import (
    AttentionPooling,
    BiLstm,
    Cnn,
    Standardise,
    Transformer,
    mean_over_time,
    positions,
)
from llm_emo.baselines.audio import MELS
from llm_emo.baselines.speech_settings import IltSettings


class Ilt(nn.Module):
    """The network of an `IltSettings`."""

    def __init__(self, settings: IltSettings, classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.standardise = Standardise(MELS)
        self.cnn = Cnn(MELS, settings.cnn)
        size = self.cnn.size
        if settings.structure != "cnn_transformer":
            self.lstm = BiLstm(size, size // 2)
        if settings.structure == "ilt":
            self.pooling = AttentionPooling(size)
            if settings.fusion == "trainable_sum":
                self.fusion = nn.Parameter(torch.zeros(2))  # W_A, W_B
        self.transformer = Transformer(size, settings.transformer)
        double = settings.structure == "ilt" and settings.fusion == "concatenation"
        self.classify = nn.Linear(2 * size if double else size, classes)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Map log-mels (B, T, M) with (B,) valid frames to logits (B, classes)."""
        logits: Tensor = self.classify(self.encode(features, lengths))
        return logits

    def encode(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Return O_final, from which the last layer makes logits; shape (B, D), or (B, 2D)."""
        if not self.settings.mask:
            lengths = torch.full_like(lengths, features.shape[1])
        c, steps = self.cnn(self.standardise(features, lengths), lengths)
        if self.settings.structure == "cnn_lstm_transformer":
            c = self.lstm(c, steps)
        located = c
        if self.settings.positional_encoding:
            located = c + positions(c.shape[1], c.shape[2], c.device)
        output = mean_over_time(self.transformer(located, None, steps), steps)
        if self.settings.structure == "ilt":
            output = self._fused(self.pooling(self.lstm(c, steps), steps), output)
        return output

    def _fused(self, lstm: Tensor, transformer: Tensor) -> Tensor:
        if self.settings.fusion == "concatenation":
            return torch.cat((lstm, transformer), 1)
        if self.settings.fusion == "sum":
            return self.settings.weight * lstm + (1 - self.settings.weight) * transformer
        share = self.fusion.softmax(0)
        return share[0] * lstm + share[1] * transformer

    def fusion_weights(self) -> tuple[float, float] | None:
        """Return the shares of LSTM and transformer, which sum to 1; None where nothing is summed.

        The paper learned 0.65 and 0.35.
        """
        if self.settings.structure != "ilt" or self.settings.fusion == "concatenation":
            return None
        if self.settings.fusion == "sum":
            return self.settings.weight, 1 - self.settings.weight
        lstm, transformer = self.fusion.detach().softmax(0).tolist()
        return lstm, transformer
