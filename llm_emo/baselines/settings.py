"""Settings of the text baselines: frozen data that a recipe can state. No torch here.

Optimiser, learning rate, batch size and epochs belong to a recipe's training section; only
`TEXT_CNN_RUNS` holds them too, because the report of paper 001 is a table of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Optimizer = Literal["adam", "sgd", "sgd_momentum", "adadelta"]
Pooling = Literal["max", "mean"]


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(what)


@dataclass(frozen=True, slots=True)
class TextCnnSettings:
    """A convolution over word vectors (paper 001, section 5)."""

    filters: int
    """Filters of each size."""
    sizes: tuple[int, ...]
    """Widths of the filters, in words; the paper's runs have one."""
    stride: int
    """Words from one window to the next."""
    pooling: Pooling
    """What is kept of a filter's windows; the paper's is `max` (1-max pooling)."""
    dropout: float
    """On the pooled features, as a probability."""
    train_vectors: bool
    """Whether word vectors learn with the network, or stay what they are."""

    def __post_init__(self) -> None:
        _require(self.filters >= 1, f"filters: expected at least 1, found {self.filters}")
        _require(self.stride >= 1, f"stride: expected at least 1, found {self.stride}")
        _require(0 <= self.dropout < 1, f"dropout: expected 0 <= p < 1, found {self.dropout}")
        _require(
            bool(self.sizes) and min(self.sizes) >= 1,
            f"sizes: expected one or more widths of at least 1, found {self.sizes}",
        )


@dataclass(frozen=True, slots=True)
class TextCnnRun:
    """One row of paper 001's figures 2 to 4."""

    network: TextCnnSettings
    optimizer: Optimizer
    learning_rate: float
    batch_size: int
    epochs: int


def _run(
    optimizer: Optimizer, *, filters: int = 100, stride: int = 1, size: int = 3, dropout: float = 0
) -> TextCnnRun:
    # That word vectors learn is our choice (the report says nothing).
    network = TextCnnSettings(filters, (size,), stride, "max", dropout, train_vectors=True)
    return TextCnnRun(network, optimizer, learning_rate=0.01, batch_size=50, epochs=100)


TEXT_CNN_RUNS: Mapping[int, TextCnnRun] = MappingProxyType(
    {
        1: _run("adam", filters=1),
        2: _run("adam"),
        3: _run("sgd_momentum"),
        4: _run("sgd"),
        5: _run("adadelta"),
        6: _run("sgd_momentum", stride=3),
        7: _run("sgd_momentum", size=7),
        8: _run("sgd_momentum", dropout=0.2),
    }
)
"""The eight runs of paper 001, by the number that its tables have in `notes`."""


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """Stage 1 of paper 000: a transformers encoder fine-tuned as a sentence classifier."""

    max_length: int
    """Tokens of an utterance, [CLS] and [SEP] included; what is longer loses its end."""
    dropout: float
    """Before both layers of the classification head, as a probability."""

    def __post_init__(self) -> None:
        _require(self.max_length >= 3, f"max_length: expected at least 3, found {self.max_length}")
        _require(0 <= self.dropout < 1, f"dropout: expected 0 <= p < 1, found {self.dropout}")


@dataclass(frozen=True, slots=True)
class RobertaCnnLstmSettings:
    """Stage 2 of paper 000, over the utterances of a dialogue.

    The ablations are `cnn_lstm=False`, `residual=False`, and both, which leaves the encoder's
    features and fully connected layers.
    """

    cnn_lstm: bool
    """Whether the two recurrent branches are there."""
    residual: bool
    """Whether the encoder's features are added once more, through two layers."""
    dropout: float
    """After every fully connected layer but the last, and after the branches."""
    reduced: int = 1024
    """Features of an utterance after the first fully connected layer."""
    units: int = 256
    """Hidden units of every LSTM and direction, and filters of the convolution."""
    head: int = 256
    """Units between the two last fully connected layers."""

    def __post_init__(self) -> None:
        sizes = (self.reduced, self.units, self.head)
        _require(min(sizes) >= 1, f"reduced, units, head: expected at least 1, found {sizes}")
        _require(0 <= self.dropout < 1, f"dropout: expected 0 <= p < 1, found {self.dropout}")


@dataclass(frozen=True, slots=True)
class LinearSettings:
    """TF-IDF features and logistic regression: what a second of work gives."""

    unit: Literal["word", "character"]
    """What n-grams are made of; Chinese, which has no spaces, needs characters."""
    ngrams: tuple[int, int]
    """Shortest and longest n-gram, in units."""
    min_texts: int
    """Training texts that an n-gram must occur in."""
    strength: float
    """Inverse of the L2 penalty (scikit-learn's C)."""
    balanced: bool
    """Weight classes by the inverse of their frequency."""

    def __post_init__(self) -> None:
        low, high = self.ngrams
        _require(1 <= low <= high, f"ngrams: expected 1 <= shortest <= longest, found {low, high}")
        _require(self.min_texts >= 1, f"min_texts: expected at least 1, found {self.min_texts}")
        _require(self.strength > 0, f"strength: expected above 0, found {self.strength}")


# --- what to do about rare classes ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plain:
    """Cross-entropy; every row counts the same."""


@dataclass(frozen=True, slots=True)
class ClassWeights:
    """Rows of class c weigh n_c ** -strength, scaled to mean 1 over the training rows."""

    strength: float = 1.0
    """1 gives every class the same weight in sum, 0 every row."""

    def __post_init__(self) -> None:
        _require(0 <= self.strength <= 1, f"strength: expected 0 to 1, found {self.strength}")


@dataclass(frozen=True, slots=True)
class Resampling:
    """An epoch of as many rows, in which rare classes are drawn more often."""

    strength: float = 1.0
    """1 draws every class equally often, 0 as often as it occurs; linear between."""

    def __post_init__(self) -> None:
        _require(0 <= self.strength <= 1, f"strength: expected 0 to 1, found {self.strength}")


@dataclass(frozen=True, slots=True)
class Focal:
    """Focal loss, (1 - p) ** gamma times cross-entropy (Lin et al. 2017, arXiv:1708.02002)."""

    gamma: float = 2.0
    """How much less a row counts that is right already."""
    balanced: bool = False
    """Weigh rows as `ClassWeights(1)` too, which is that paper's alpha."""

    def __post_init__(self) -> None:
        _require(self.gamma >= 0, f"gamma: expected at least 0, found {self.gamma}")


@dataclass(frozen=True, slots=True)
class LogitAdjustment:
    """Cross-entropy over logits + tau log prior (Menon et al. 2021, arXiv:2007.07314)."""

    tau: float = 1.0
    """1 makes balanced accuracy the aim (the paper's equation 10), 0 plain accuracy."""

    def __post_init__(self) -> None:
        _require(self.tau >= 0, f"tau: expected at least 0, found {self.tau}")


Imbalance = Plain | ClassWeights | Resampling | Focal | LogitAdjustment
