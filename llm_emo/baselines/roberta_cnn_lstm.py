"""Stage 2 of paper 000: a CNN-LSTM with residuals over the utterances of a dialogue.

Figure 2, sections 3.2 and 3.3 (no equations there); the sizes are the paper's, for D = 4096:

    e = encoder features                                                    (B, T, D)
    r = FC(e)                                                               (B, T, 1024)
    a = Bi-LSTM of two layers, 256 units (r)                                (B, T, 512)
    b = Bi-LSTM, 256 units (ReLU(BatchNorm(Conv1d(r; 256, width 3, stride 2))))    (B, T', 512)
    h = [a ; b back on T] + FC(ReLU(FC(e)))                                 (B, T, 1024)
    logits = FC(ReLU(FC(h)))                                                (B, T, C)

Where the paper is silent:

- Stride 2 leaves T' = ceil(T / 2) windows. Padded by one zero on both sides, window j is centred
  on utterance 2j and covers 2j - 1 to 2j + 1. Utterance t takes window floor(t / 2), which covers
  it; so every utterance has one vector, and neighbours 2j and 2j + 1 share theirs.
- "256 units" are those of one direction. The first FC has no activation; dropout follows every
  FC but the last, and the branches. The stacked FC are two, with 256 units between them.
- The residual adds the encoder's features through two FC layers with ReLU between, once.
- Without the CNN-LSTM, r stands where [a ; b] stood.

A dialogue reads all its turns, later ones too, as the paper's backward LSTM does.

**Padding changes nothing.** Turns beyond a dialogue's length are zeros before the convolution,
no part of batch normalisation's statistics, and not stepped over by any LSTM, the backward one
included. Dropout draws its masks by position, so this holds for dropout 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llm_emo.baselines.acoustic import BiLstm, within
from llm_emo.baselines.settings import RobertaCnnLstmSettings

WIDTH, STRIDE = 3, 2
"""Of the convolution, in utterances."""


class RobertaCnnLstm(nn.Module):
    """Features of a dialogue's utterances to their class scores.

    Args:
        settings: sizes, dropout, ablations.
        inputs: encoder features of an utterance, D.
        classes: C.
    """

    def __init__(self, settings: RobertaCnnLstmSettings, *, inputs: int, classes: int) -> None:
        super().__init__()
        reduced, units = settings.reduced, settings.units
        width = 4 * units if settings.cnn_lstm else reduced
        self.reduce = nn.Linear(inputs, reduced)
        self.branches = Branches(reduced, units) if settings.cnn_lstm else None
        self.residual = (
            nn.Sequential(
                nn.Linear(inputs, width),
                nn.ReLU(),
                nn.Dropout(settings.dropout),
                nn.Linear(width, width),
            )
            if settings.residual
            else None
        )
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Sequential(
            nn.Linear(width, settings.head),
            nn.ReLU(),
            nn.Dropout(settings.dropout),
            nn.Linear(settings.head, classes),
        )

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Return class scores, shape (B, T, C); those beyond a dialogue's length mean nothing.

        Args:
            features: of the utterances, shape (B, T, D); padding may hold anything.
            lengths: turns of every dialogue, at least 1, shape (B,).
        """
        beyond = turns_beyond(lengths, features.shape[1])  # (B, T)
        features = features.masked_fill(beyond[..., None], 0)
        context = self.dropout(self.reduce(features))  # (B, T, reduced)
        if self.branches is not None:
            context = self.dropout(self.branches(context, lengths))  # (B, T, 4 units)
        if self.residual is not None:
            context = context + self.dropout(self.residual(features))
        logits: Tensor = self.head(context)
        return logits


class Branches(nn.Module):
    """The two parallel branches, joined; (B, T, inputs) to (B, T, 4 units)."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.long = nn.ModuleList((BiLstm(inputs, units), BiLstm(2 * units, units)))
        self.convolution = nn.Conv1d(inputs, units, WIDTH, STRIDE, padding=WIDTH // 2)
        self.norm = MaskedBatchNorm(units)
        self.local = BiLstm(units, units)

    def forward(self, turns: Tensor, lengths: Tensor) -> Tensor:
        """Return both branches' vectors of every turn; `lengths` as in `RobertaCnnLstm`."""
        time = turns.shape[1]
        turns = turns.masked_fill(turns_beyond(lengths, time)[..., None], 0)
        far = turns
        for layer in self.long:
            far = layer(far, lengths)  # (B, T, 2 units)

        windows = (lengths + STRIDE - 1) // STRIDE  # (B,)
        near = self.convolution(turns.transpose(1, 2)).transpose(1, 2)  # (B, T', units)
        near = self.norm(near, ~turns_beyond(windows, near.shape[1])).relu()
        near = self.local(near, windows)  # (B, T', 2 units)
        near = near.repeat_interleave(STRIDE, dim=1)[:, :time]
        return torch.cat([far, near], dim=2)


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the positions that are there."""

    def forward(self, values: Tensor, there: Tensor) -> Tensor:  # type: ignore[override]
        """Return normalised values, shape (B, T, F), zeros elsewhere; `there` is (B, T).

        A single position has no variance; like one at inference it is normalised by the running
        statistics, which stay.
        """
        real = values[there]  # (M, F)
        if self.training and len(real) == 1:
            real = nn.functional.batch_norm(
                real, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        else:
            real = super().forward(real)
        whole = real.new_zeros(values.shape)
        whole[there] = real
        return whole


def turns_beyond(lengths: Tensor, time: int) -> Tensor:
    """Return which of `time` positions are padding, shape (B, time)."""
    return ~within(lengths, time)


def pad(dialogues: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return features of dialogues, each (T_i, D), as (B, T, D), and their lengths, (B,)."""
    lengths = torch.tensor([len(dialogue) for dialogue in dialogues])
    return pad_sequence(list(dialogues), batch_first=True), lengths
