"""Settings of the text baselines, and what is done about rare classes. No torch here.

Optimiser, learning rate, batch size and epochs belong to a recipe's training section.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llm_emo.sections import Dropout, Many, Section, Size

Pooling = Literal["max", "mean"]


class TextCnnSettings(Section):
    """A convolution over word vectors (paper 001, section 5)."""

    filters: int = Field(ge=1)
    """Filters of each size."""
    sizes: Many[Size] = Field(min_length=1)
    """Widths of the filters, in words; the paper's runs have one."""
    stride: int = Field(ge=1)
    """Words from one window to the next."""
    pooling: Pooling
    """What is kept of a filter's windows; the paper's is `max` (1-max pooling)."""
    dropout: Dropout
    """On the pooled features, as a probability."""
    train_vectors: bool
    """Whether word vectors learn with the network, or stay what they are."""


class EncoderSettings(Section):
    """Stage 1 of paper 000: a transformers encoder fine-tuned as a sentence classifier."""

    max_length: int = Field(ge=3)
    """Tokens of an utterance, [CLS] and [SEP] included; what is longer loses its end."""
    dropout: Dropout
    """Before both layers of the classification head, as a probability."""


class RobertaCnnLstmSettings(Section):
    """Stage 2 of paper 000, over the utterances of a dialogue.

    The ablations are `cnn_lstm: false`, `residual: false`, and both, which leaves the encoder's
    features and fully connected layers.
    """

    cnn_lstm: bool
    """Whether the two recurrent branches are there."""
    residual: bool
    """Whether the encoder's features are added once more, through two layers."""
    dropout: Dropout
    """After every fully connected layer but the last, and after the branches."""
    reduced: Size
    """Features of an utterance after the first fully connected layer."""
    units: Size
    """Hidden units of every LSTM and direction, and filters of the convolution."""
    head: Size
    """Units between the two last fully connected layers."""


class LinearSettings(Section):
    """TF-IDF features and logistic regression: what a second of work gives."""

    unit: Literal["word", "character"]
    """What n-grams are made of; Chinese, which has no spaces, needs characters."""
    ngrams: Annotated[tuple[Size, Size], Field(strict=False)]
    """Shortest and longest n-gram, in units."""
    min_texts: int = Field(ge=1)
    """Training texts that an n-gram must occur in."""
    strength: float = Field(gt=0)
    """Inverse of the L2 penalty (scikit-learn's C)."""
    balanced: bool
    """Weight classes by the inverse of their frequency."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.ngrams[0] > self.ngrams[1]:
            raise ValueError(f"ngrams: expected shortest <= longest, found {list(self.ngrams)}")
        return self


# --- what to do about rare classes ----------------------------------------------------------------


class ClassWeights(Section):
    """Rows of class c weigh n_c ** -strength, scaled to mean 1 over the training rows."""

    kind: Literal["class_weights"] = "class_weights"
    """The remedy."""
    strength: float = Field(ge=0, le=1)
    """1 gives every class the same weight in sum, 0 every row."""


class Resampling(Section):
    """An epoch of as many rows, in which rare classes are drawn more often."""

    kind: Literal["resampling"] = "resampling"
    """The remedy."""
    strength: float = Field(ge=0, le=1)
    """1 draws every class equally often, 0 as often as it occurs; linear between."""


class Focal(Section):
    """Focal loss, (1 - p) ** gamma times cross-entropy (Lin et al. 2017, arXiv:1708.02002)."""

    kind: Literal["focal"] = "focal"
    """The remedy."""
    gamma: float = Field(ge=0)
    """How much less a row counts that is right already; that paper's is 2."""
    balanced: bool = False
    """Weigh rows as `class_weights` of strength 1 too, which is that paper's alpha."""


class LogitAdjustment(Section):
    """Cross-entropy over logits + tau log prior (Menon et al. 2021, arXiv:2007.07314)."""

    kind: Literal["logit_adjustment"] = "logit_adjustment"
    """The remedy."""
    tau: float = Field(ge=0)
    """1 makes balanced accuracy the aim (the paper's equation 10), 0 plain accuracy."""


Imbalance = Annotated[
    ClassWeights | Resampling | Focal | LogitAdjustment, Field(discriminator="kind")
]
"""What is done about rare classes; None is plain cross-entropy, in which every row counts 1."""
