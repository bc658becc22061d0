"""Settings of the speech baselines: frozen data that a recipe can state. No torch here.

Optimiser, learning rate, batch size and epochs belong to a recipe's training section: paper 004
has Adam at 1e-4 with betas (0.9, 0.99), batches of 40 and 100 epochs.
"""

from dataclasses import dataclass
from typing import Literal

IltStructure = Literal["ilt", "cnn_transformer", "cnn_lstm_transformer"]
IltFusion = Literal["concatenation", "sum", "trainable_sum"]
CatStructure = Literal["cat", "cnn_to_lstm", "lstm_to_cnn", "cnn_plus_lstm", "lstm_transformer"]


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(what)


@dataclass(frozen=True, slots=True)
class Noise:
    """White noise on copies of a clip, in train and dev (paper 004, section 3.2)."""

    copies: int = 1
    """Noisy copies of each clip beside the clean one; 0 is none."""
    low: float = 20.0
    high: float = 30.0
    """Signal-to-noise ratio in dB, drawn evenly between the two for each copy."""

    def __post_init__(self) -> None:
        _require(self.copies >= 0, f"copies: expected at least 0, found {self.copies}")
        _require(self.low <= self.high, f"low, high: found {self.low} above {self.high}")


@dataclass(frozen=True, slots=True)
class CnnSettings:
    """The "several conv blocks" of paper 004, whose number and sizes it does not print."""

    channels: tuple[int, ...] = (16, 32, 64, 128)
    """One block each."""
    kernel: int = 3
    """Frames and mel bands that a convolution sees."""
    pool: int = 2
    """What average pooling divides time and bands by, after each block."""
    dropout: float = 0.1
    """After each block, as a probability."""

    def __post_init__(self) -> None:
        sizes = (*self.channels, self.kernel, self.pool)
        _require(bool(self.channels), "channels: expected one or more blocks")
        _require(min(sizes) >= 1, f"channels, kernel, pool: expected at least 1, found {sizes}")
        _require(0 <= self.dropout < 1, f"dropout: expected 0 <= p < 1, found {self.dropout}")


@dataclass(frozen=True, slots=True)
class TransformerSettings:
    """A transformer's sizes, none of which paper 004 prints."""

    layers: int = 1
    heads: int = 4
    """Must divide the features of a step."""
    inner: int = 512
    """Units of the feed-forward part."""
    dropout: float = 0.1
    """In attention, and after both parts of a layer, as a probability."""

    def __post_init__(self) -> None:
        sizes = (self.layers, self.heads, self.inner)
        _require(min(sizes) >= 1, f"layers, heads, inner: expected at least 1, found {sizes}")
        _require(0 <= self.dropout < 1, f"dropout: expected 0 <= p < 1, found {self.dropout}")


@dataclass(frozen=True, slots=True)
class IltSettings:
    """One row of paper 004's table 1; the defaults are its best."""

    structure: IltStructure = "ilt"
    """The LSTM beside the transformer, or one of the two baselines in cascade."""
    fusion: IltFusion = "trainable_sum"
    """How the two flows of "ilt" meet (equations 12 to 16)."""
    weight: float = 0.5
    """The LSTM's share alpha of a "sum" (equation 13)."""
    positional_encoding: bool = False
    mask: bool = True
    """Whether padding is masked; the paper's networks read it as silence."""
    cnn: CnnSettings = CnnSettings()
    transformer: TransformerSettings = TransformerSettings()

    def __post_init__(self) -> None:
        _require(0 <= self.weight <= 1, f"weight: expected 0 to 1, found {self.weight}")


@dataclass(frozen=True, slots=True)
class CatSettings:
    """One row of paper 004's table 2; the defaults are its best."""

    structure: CatStructure = "cat"
    """Both cross-attending transformers, one of them, none, or one on the LSTM alone."""
    positional_encoding: bool = False
    mask: bool = True
    """Whether padding is masked; the paper's networks read it as silence."""
    window: int = 8
    """Frames that make one step of the LSTM."""
    filters: int = 128
    """Of the convolution that makes them."""
    cnn: CnnSettings = CnnSettings()
    transformer: TransformerSettings = TransformerSettings()

    def __post_init__(self) -> None:
        sizes = (self.window, self.filters)
        _require(min(sizes) >= 1, f"window, filters: expected at least 1, found {sizes}")


@dataclass(frozen=True, slots=True)
class ClassifierSettings:
    """Pipelines 1 and 2 of paper 002: an encoder that is fine-tuned by itself."""

    dropout: float = 0.1
    """On an utterance's features, as a probability."""
    max_tokens: int = 128
    """Tokens of a text; what is longer loses its end."""
    max_samples: int = 54_622
    """Samples of a clip at 16 kHz: 3.4 s, a tenth of IEMOCAP's longest clip, as in the paper."""

    def __post_init__(self) -> None:
        sizes = (self.max_tokens, self.max_samples)
        _require(min(sizes) >= 1, f"max_tokens, max_samples: expected at least 1, found {sizes}")
        _require(0 <= self.dropout < 1, f"dropout: expected 0 <= p < 1, found {self.dropout}")


@dataclass(frozen=True, slots=True)
class FusionSettings:
    """Pipeline 3 of paper 002: a network of four layers, whose sizes it does not print."""

    hidden: tuple[int, ...] = (512, 256, 128)
    """Units of the layers under the one that gives the classes."""
    dropout: float = 0.1
    """Between layers, as a probability."""

    def __post_init__(self) -> None:
        _require(min(self.hidden, default=1) >= 1, f"hidden: expected >= 1, found {self.hidden}")
        _require(0 <= self.dropout < 1, f"dropout: expected 0 <= p < 1, found {self.dropout}")
