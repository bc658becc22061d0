"""The blocks that ILT and CAT are built of.

Paper: He, Minematsu and Saito, "Effective Integration of Transformer for Network-based Speech
Emotion Recognition"; equation numbers are its.

Every block takes the number of valid steps of each row, and what stands beyond them changes
nothing: not the statistics of batch normalisation, not the LSTM that runs backwards, no
attention, no mean. A row gives the same in any company as alone. The paper pads with silence and
masks nothing; a network with `mask=False` does that, by calling every frame valid.

Letters: B rows, T frames, R frames of all rows together, M mel bands, C channels, K steps,
D features, H units of an LSTM in one direction.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llm_emo.baselines.speech_settings import CnnSettings, TransformerSettings


def within(lengths: Tensor, steps: int) -> Tensor:
    """Return which steps are valid: booleans of shape (B, steps)."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def mean_over_time(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean of the valid steps; (B, K, D) -> (B, D)."""
    valid = within(lengths, x.shape[1])[..., None]
    return (x * valid).sum(1) / lengths[:, None]


class Standardise(nn.Module):
    """Bring every mel band to mean 0 and variance 1 over the training clips' valid frames.

    The paper is silent. Without it an LSTM would read numbers near -60 dB, which saturate its
    gates. The two statistics are saved with the network; until `fit` they change nothing.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(mels))
        self.register_buffer("deviation", torch.ones(mels))

    def fit(self, clips: Sequence[Tensor]) -> None:
        """Measure the training clips, shapes (T_i, M)."""
        frames = torch.cat(list(clips)).double()
        self.mean.copy_(frames.mean(0))
        # A band in which nothing ever sounds stays as it is instead of becoming infinite.
        self.deviation.copy_(frames.std(0, correction=0).clamp(min=1e-3))

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Return the features standardised, padding at 0; (B, T, M) -> (B, T, M)."""
        valid = within(lengths, features.shape[1])[..., None]
        return ((features - self.mean) / self.deviation).masked_fill(~valid, 0)


class Cnn(nn.Module):
    """Equation 5: convolution, batch normalisation, average pooling, dropout, block after block.

    The paper names no activation; without one the blocks would be one linear map, so a ReLU
    stands after the normalisation. Channels and remaining bands become the D features of a step.
    With the shipped recipes' sizes 750 frames become 46 steps of 256 features.
    """

    def __init__(self, mels: int, settings: CnnSettings) -> None:
        super().__init__()
        self.pool = settings.pool
        self.convolutions = nn.ModuleList()
        self.norms = nn.ModuleList()
        before = 1
        for channels in settings.channels:
            # The norm has its own bias.
            self.convolutions.append(
                nn.Conv2d(before, channels, settings.kernel, padding="same", bias=False)
            )
            self.norms.append(nn.BatchNorm1d(channels))
            before, mels = channels, mels // settings.pool
        self.dropout = nn.Dropout(settings.dropout)
        self.size = before * mels
        """D."""
        if not self.size or self.size % 2:
            raise ValueError(
                f"cnn: {len(settings.channels)} blocks that pool by {settings.pool} leave {mels} "
                f"mel bands, times {before} channels; expected an even number of features, "
                "half for each direction of an LSTM"
            )
        self.reach = settings.kernel // 2
        """Frames that a convolution sees to either side."""
        self.shortest = settings.pool ** len(settings.channels)
        """Frames that make one step; a shorter clip counts as so long."""

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, T, M), zero beyond `lengths`, to (B, K, D) and the steps of each row.

        The rows lie one after the other on one time axis (R frames), with silence between them,
        instead of beside each other: what is computed is then as long as the clips are, not as
        often the longest.
        """
        lengths = lengths.clamp(min=self.shortest)
        x = nn.functional.pad(x, (0, 0, 0, max(0, int(lengths.max()) - x.shape[1])))
        slots = self._slots(lengths)
        starts = slots.cumsum(0) - slots
        places = _places(starts, lengths)
        line = x.new_zeros(int(slots.sum()), x.shape[2], 1)  # (R, M, C)
        line[places, :, 0] = x[within(lengths, x.shape[1])]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            line = _normalised(norm, _over_time(convolution, line), places)
            line = _over_time(nn.functional.avg_pool2d, line, self.pool)
            # As pooling a row alone does: what does not fill a window at the end falls away.
            lengths, starts = lengths // self.pool, starts // self.pool
            places = _places(starts, lengths)
            valid = line.new_zeros(len(line), 1, 1)
            valid[places] = 1
            line = self.dropout(line * valid)
        steps = line.new_zeros(len(lengths), int(lengths.max()), self.size)
        steps[within(lengths, steps.shape[1])] = line[places].flatten(1)
        return steps, lengths

    def _slots(self, lengths: Tensor) -> Tensor:
        """Return the frames that each row has on the common time axis.

        So many that a slot can be pooled by itself in every block, and that no convolution sees
        two rows at once.
        """
        needed = lengths
        for block in range(len(self.convolutions)):
            unit = self.pool**block
            needed = needed.maximum((lengths // unit + self.reach) * unit)
        slots: Tensor = -(-needed // self.shortest) * self.shortest
        return slots


def _places(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return where the valid frames of all rows lie on the common time axis, row after row."""
    before = lengths.cumsum(0) - lengths
    shift = (starts - before).repeat_interleave(lengths)
    return shift + torch.arange(len(shift), device=shift.device)


def _over_time(function: Callable[..., Tensor], line: Tensor, *arguments: int) -> Tensor:
    """Apply a function of images to (R, M, C).

    Channels lie last in memory throughout, where a frame is one piece and a norm takes rows.
    """
    # In this order, here and on the way back: the stride of a batch that is added to turned axes
    # makes torch take channels to lie first, and copy.
    image = line[None].permute(0, 3, 1, 2)  # (1, C, R, M)
    result: Tensor = function(image, *arguments).permute(0, 2, 3, 1).squeeze(0)
    return result


def _normalised(norm: nn.Module, line: Tensor, places: Tensor) -> Tensor:
    """Normalise the valid frames over each other, and rectify; the others become 0; (R, M, C)."""
    sound = line.index_select(0, places)  # (frames, M, C)
    kept = norm(sound.flatten(0, 1)).relu_().view_as(sound)
    return torch.zeros_like(line).index_copy_(0, places, kept)


class BiLstm(nn.Module):
    """Equations 6 to 8: an LSTM in both directions; (B, K, D) -> (B, K, 2H), 0 beyond lengths.

    The backward direction begins at the last valid step: each row is turned by itself. One LSTM a
    direction on padded rows is up to twice as fast on a CPU as a packed one of both.
    """

    def __init__(self, features: int, units: int) -> None:
        super().__init__()
        self.onward = nn.LSTM(features, units, batch_first=True)
        self.back = nn.LSTM(features, units, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return the states of both directions, concatenated."""
        step = torch.arange(x.shape[1], device=x.device)
        valid = within(lengths, x.shape[1])
        # The last valid step first; what stands beyond stays there, where nothing reads it.
        turned = torch.where(valid, lengths[:, None] - 1 - step, step)[..., None]  # (B, K, 1)
        onward, _ = self.onward(x)
        backward, _ = self.back(x.take_along_dim(turned, 1))
        states = torch.cat((onward, backward.take_along_dim(turned, 1)), 2)
        return states.masked_fill(~valid[..., None], 0)


class AttentionPooling(nn.Module):
    """Equations 9 and 10: the mean of the steps, weighted by a softmax over W.h_t."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.score = nn.Linear(features, 1, bias=False)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Map (B, K, D) to (B, D)."""
        scores = self.score(x).squeeze(2).masked_fill(~within(lengths, x.shape[1]), -math.inf)
        weights: Tensor = scores.softmax(1)
        return (weights[:, None] @ x).squeeze(1)


def positions(steps: int, features: int, device: torch.device) -> Tensor:
    """Return the positional encoding of equations 3 and 4; shape (steps, features), even."""
    position = torch.arange(steps, device=device)[:, None]
    wave = torch.arange(0, features, 2, device=device)  # 2i
    angle = position / 10_000 ** (wave / features)
    return torch.stack((angle.sin(), angle.cos()), 2).flatten(1)


class Transformer(nn.Module):
    """Equations 1 and 2: queries attend to a context; with themselves as context, an encoder.

    Layers are those of Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762): attention, then
    a feed-forward part with a ReLU, each added to what came in and then normalised. Every layer
    of a cross-attending one has the same context.
    """

    def __init__(self, features: int, settings: TransformerSettings) -> None:
        super().__init__()
        if features % settings.heads:
            raise ValueError(
                f"transformer: {settings.heads} heads cannot share the {features} features of a "
                "step; expected a number that divides them"
            )
        self.layers = nn.ModuleList(_Layer(features, settings) for _ in range(settings.layers))

    def forward(self, queries: Tensor, context: Tensor | None, lengths: Tensor) -> Tensor:
        """Return what the queries became, (B, K, D).

        Args:
            queries: (B, K, D).
            context: (B, S, D), or None where each layer attends to its own input.
            lengths: the valid steps of the context (B,).
        """
        steps = queries.shape[1] if context is None else context.shape[1]
        hidden = ~within(lengths, steps)
        for layer in self.layers:
            queries = layer(queries, queries if context is None else context, hidden)
        return queries


class _Layer(nn.Module):
    def __init__(self, features: int, settings: TransformerSettings) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            features, settings.heads, dropout=settings.dropout, batch_first=True
        )
        self.attended = nn.LayerNorm(features)
        self.inner = nn.Sequential(
            nn.Linear(features, settings.inner),
            nn.ReLU(),
            nn.Dropout(settings.dropout),
            nn.Linear(settings.inner, features),
        )
        self.transformed = nn.LayerNorm(features)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, queries: Tensor, context: Tensor, hidden: Tensor) -> Tensor:
        attention, _ = self.attention(
            queries, context, context, key_padding_mask=hidden, need_weights=False
        )
        x = self.attended(queries + self.dropout(attention))
        result: Tensor = self.transformed(x + self.dropout(self.inner(x)))
        return result
