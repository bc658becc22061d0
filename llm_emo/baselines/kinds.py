"""The specialised models as a recipe names them: its section `method`. No torch here."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llm_emo.baselines.settings import (
    EncoderSettings,
    LinearSettings,
    RobertaCnnLstmSettings,
    TextCnnSettings,
)
from llm_emo.baselines.speech_settings import (
    CatSettings,
    ClassifierSettings,
    FusionSettings,
    IltSettings,
    Noise,
)
from llm_emo.sections import Section, require_lasting

Name = Annotated[str, Field(min_length=1)]


class _Kind(Section):
    trained: ClassVar[bool] = True
    """Whether the training loop makes it; the others are fitted in closed form."""
    whole_batches: ClassVar[bool] = False
    """Whether batch normalisation sees the rows of a pass together, so that cutting a step into
    passes or over processes would change the result."""
    hears: ClassVar[bool] = False
    """Whether it reads sound."""
    reads_dialogues: ClassVar[bool] = False
    """Whether it reads all turns of a dialogue at once; `train.batch_size` counts dialogues."""

    @property
    def below(self) -> dict[str, str]:
        """The finished runs that it builds on.

        By the folder of its own run's `adapter/` that keeps what they had learned; the recipe's
        key is this name and `_run`.
        """
        return {}


class Majority(_Kind):
    """The most frequent class of the training rows, for everything."""

    trained = False

    kind: Literal["majority"]
    """The method."""


class Linear(_Kind):
    """TF-IDF and logistic regression."""

    trained = False

    kind: Literal["linear"]
    """The method."""
    features: LinearSettings
    """N-grams and penalty."""


class TextCnn(_Kind):
    """A convolution over word vectors (paper 001)."""

    kind: Literal["text_cnn"]
    """The method."""
    network: TextCnnSettings
    """Filters, pooling, dropout."""
    vectors: Name
    """`glove-6b-50d` (from the Python package index), or a text file of GloVe or word2vec."""
    min_count: int = Field(ge=1)
    """Occurrences in the training texts below which a word is unknown."""


class _Pretrained(_Kind):
    name: Name
    """`minilm-l6` (text, from the Python package index), a local folder, or a Hugging Face id."""
    revision: Name | None = None
    """Commit or tag of a Hugging Face id; required for one, refused otherwise."""

    @model_validator(mode="after")
    def _revision_belongs_to_a_hub_id(self) -> Self:
        # That an id has one is asked for when the encoder is loaded: a finished run keeps its own,
        # and opens when the folder that this names has gone.
        require_lasting("method", self.name, self.revision)
        return self


class Encoder(_Pretrained):
    """A transformers encoder, fine-tuned as a sentence classifier (stage 1 of paper 000)."""

    kind: Literal["encoder"]
    """The method."""
    pooling: Literal["first", "mean"]
    """What stands for a text: the state of the classification token, as in paper 000, or the mean
    over its tokens, as in paper 002."""
    head: EncoderSettings
    """Length of a text, dropout."""


class RobertaCnnLstm(_Kind):
    """The dialogue network over an encoder's features (stage 2 of paper 000)."""

    whole_batches = True
    reads_dialogues = True

    kind: Literal["roberta_cnn_lstm"]
    """The method."""
    encoder_run: Name
    """The finished run of method `encoder` whose features are read; it stays as it is."""
    network: RobertaCnnLstmSettings
    """Sizes, dropout, ablations."""

    @property
    def below(self) -> dict[str, str]:
        """The encoder's run."""
        return {"encoder": self.encoder_run}


class Ilt(_Kind):
    """An LSTM and a transformer beside each other on log-mels, and its baselines (paper 004)."""

    whole_batches = True
    hears = True

    kind: Literal["ilt"]
    """The method."""
    network: IltSettings
    """One row of the paper's table 1."""
    noise: Noise
    """Copies of the training and dev clips."""


class Cat(_Kind):
    """A CNN and an LSTM that attend to each other, and its baselines (paper 004)."""

    whole_batches = True
    hears = True

    kind: Literal["cat"]
    """The method."""
    network: CatSettings
    """One row of the paper's table 2."""
    noise: Noise
    """Copies of the training and dev clips."""


class SpeechEncoder(_Pretrained):
    """A transformers speech encoder (Wav2Vec2, HuBERT, WavLM, Whisper), fine-tuned (paper 002)."""

    hears = True

    kind: Literal["speech_encoder"]
    """The method."""
    head: ClassifierSettings
    """Length of a clip, dropout."""


class Fusion(_Kind):
    """Features and class scores of finished runs into four linear layers (paper 002)."""

    kind: Literal["fusion"]
    """The method."""
    text_run: Name | None = None
    """The finished run that reads; without it, the fusion hears only."""
    audio_run: Name | None = None
    """The finished run that hears; without it, the fusion reads only."""
    network: FusionSettings
    """Sizes, dropout."""

    @property
    def below(self) -> dict[str, str]:
        """The run that reads, the run that hears, or both."""
        named = {"text": self.text_run, "audio": self.audio_run}
        return {name: run for name, run in named.items() if run is not None}


Kind = Majority | Linear | TextCnn | Encoder | RobertaCnnLstm | Ilt | Cat | SpeechEncoder | Fusion
