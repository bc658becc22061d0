"""Settings of the speech baselines: frozen data that a recipe can state. No torch here.

Optimiser, learning rate, batch size and epochs belong to a recipe's training section: paper 004
has Adam at 1e-4 with betas (0.9, 0.99), batches of 40 and 100 epochs. Every setting here changes
a score, so none has a default; what a paper does not print is the shipped recipes' choice.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from llm_emo.sections import Dropout, Many, Section, Size

IltStructure = Literal["ilt", "cnn_transformer", "cnn_lstm_transformer"]
IltFusion = Literal["concatenation", "sum", "trainable_sum"]
CatStructure = Literal["cat", "cnn_to_lstm", "lstm_to_cnn", "cnn_plus_lstm", "lstm_transformer"]


class Noise(Section):
    """White noise on copies of a clip, in train and dev (paper 004, section 3.2)."""

    copies: int = Field(ge=0)
    """Noisy copies of each clip beside the clean one; 0 is none."""
    low: float
    """The lowest signal-to-noise ratio of a copy, in dB."""
    high: float
    """The highest; each copy's is drawn evenly between the two."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low, high: expected low <= high, found {self.low} and {self.high}")
        return self


class CnnSettings(Section):
    """The "several conv blocks" of paper 004, whose number and sizes it does not print."""

    channels: Many[Size] = Field(min_length=1)
    """One block each."""
    kernel: Size
    """Frames and mel bands that a convolution sees."""
    pool: Size
    """What average pooling divides time and bands by, after each block."""
    dropout: Dropout
    """After each block, as a probability."""


class TransformerSettings(Section):
    """A transformer's sizes, none of which paper 004 prints."""

    layers: Size
    """Layers, each with attention and a feed-forward part."""
    heads: Size
    """Must divide the features of a step."""
    inner: Size
    """Units of the feed-forward part."""
    dropout: Dropout
    """In attention, and after both parts of a layer, as a probability."""


class IltSettings(Section):
    """One row of paper 004's table 1."""

    structure: IltStructure
    """The LSTM beside the transformer, or one of the two baselines in cascade."""
    fusion: IltFusion
    """How the two flows of "ilt" meet (equations 12 to 16)."""
    weight: float = Field(ge=0, le=1)
    """The LSTM's share alpha of a "sum" (equation 13); the other fusions have no use for it."""
    positional_encoding: bool
    """Whether sines are added before the transformer (equations 3 and 4)."""
    mask: bool
    """Whether padding is masked; the paper's networks read it as silence."""
    cnn: CnnSettings
    transformer: TransformerSettings


class CatSettings(Section):
    """One row of paper 004's table 2."""

    structure: CatStructure
    """Both cross-attending transformers, one of them, none, or one on the LSTM alone."""
    positional_encoding: bool
    """Whether sines are added before the transformer (equations 3 and 4)."""
    mask: bool
    """Whether padding is masked; the paper's networks read it as silence."""
    window: Size
    """Frames that make one step of the LSTM."""
    filters: Size
    """Of the convolution that makes them."""
    cnn: CnnSettings
    transformer: TransformerSettings


class ClassifierSettings(Section):
    """Pipelines 1 and 2 of paper 002: an encoder that is fine-tuned by itself."""

    dropout: Dropout
    """On an utterance's features, as a probability."""
    max_samples: Size
    """Samples of a clip at 16 kHz: 3.4 s, a tenth of IEMOCAP's longest clip, as in the paper."""


class FusionSettings(Section):
    """Pipeline 3 of paper 002: a network of four layers, whose sizes it does not print."""

    hidden: Many[Size]
    """Units of the layers under the one that gives the classes."""
    dropout: Dropout
    """Between layers, as a probability."""
