"""The sections of a recipe: data, prompt, base model, an LLM's method, training, inference.

What a specialised model's section `method` can hold is in `baselines.kinds`; which sections a
recipe must have, and how a file is read, in `recipes`, under which all of these can be named.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llm_emo.baselines.settings import Imbalance
from llm_emo.sections import Section, is_hub_id, require_lasting
from llm_emo.validation import conflict

BUNDLED_MODEL = "smollm2-135m"
"""The model name that stands for the SmolLM2-135M-Instruct from the Python package index."""


class Limit(Section):
    """How many rows of a split are used at most; a split that is not named is used whole."""

    train: int | None = Field(None, ge=1)
    """Training rows, drawn with the recipe's seed."""
    dev: int | None = Field(None, ge=1)
    """Dev rows."""
    test: int | None = Field(None, ge=1)
    """Test rows; a report on fewer rows is not comparable with one on all."""


class Data(Section):
    """Which rows are read, and under which protocol they count."""

    dataset: str = Field(min_length=1)
    """The corpus, as `llm-emo datasets` lists it."""
    protocol: str = Field(min_length=1)
    """Rows, classes and metrics; must be one of the corpus's protocols."""
    hub: str | None = Field(None, min_length=1)
    """Read the corpus from this Hugging Face dataset instead of the data root: an id with its
    revision, `owner/name@revision`, or a local folder."""
    fold: int | None = Field(None, ge=0)
    """Which fold of a cross-validation protocol is the test split."""
    dev_fraction: float = Field(gt=0, lt=1)
    """Share of the training groups that become dev where the corpus has no dev split, 0 to 1."""
    limit: Limit | None = None
    """Caps on the rows of each split."""


class PromptChoice(Section):
    """How an utterance becomes an instruction."""

    name: str = Field(min_length=1)
    """A shipped prompt, or the path of a prompt file."""
    history_window: int | None = Field(ge=0)
    """How many earlier turns of the dialogue are shown, in turns; 0 shows none, null as many as
    the prompt file says. Required, because it changes a score."""
    max_length: int = Field(ge=16)
    """Tokens of one example, answer included; what is too long loses corpus text only."""


class Model(Section):
    """The base model, which stays frozen under an adapter."""

    name: str = Field(min_length=1)
    """`smollm2-135m` (bundled), a local folder, or a Hugging Face id `owner/name`."""
    revision: str | None = Field(None, min_length=1)
    """Commit (40 hex digits) or tag of a Hugging Face id; required for one, refused otherwise."""
    dtype: Literal["auto", "float32", "bfloat16"]
    """Weights and activations; `auto` takes bfloat16 where the machine is good at it."""
    quantization: Literal["none", "nf4", "int8"]
    """Storage of the frozen base weights (bitsandbytes)."""

    @property
    def origin(self) -> Literal["bundled", "folder", "hub"]:
        """Where the weights come from; a revision is what makes a name a Hugging Face id."""
        if self.name == BUNDLED_MODEL:
            return "bundled"
        return "folder" if self.revision is None else "hub"

    @model_validator(mode="after")
    def _revision_belongs_to_a_hub_id(self) -> Self:
        if self.revision is None and is_hub_id(self.name) and not Path(self.name).is_dir():
            raise conflict(
                f"'model.name': {self.name!r} is no local folder, and as a Hugging Face id it "
                "needs 'model.revision' (a 40-digit commit or a tag)",
                "model.name",
                "model.revision",
            )
        require_lasting("model", self.name, self.revision)
        return self


QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
"""The three projections of an attention block, which all read the block's input."""


class Lora(Section):
    """Low-rank adaptation of linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    kind: Literal["lora"]
    """The method."""
    rank: int = Field(ge=1)
    """Rank r of the update B·A of every adapted layer."""
    alpha: float = Field(gt=0)
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = Field(ge=0, lt=1)
    """Dropout on the adapter's input, as a probability."""
    # Lists of YAML become tuples, so that a recipe is immutable to the bottom.
    target_modules: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        strict=False, min_length=1
    )
    """Names of the adapted linear layers, as they end in the model's module names."""
    tie_a: bool = False
    """Train one A for the query, key and value projections together, which is what LoRA on the one
    `query_key_value` layer of ChatGLM2's own code does; `target_modules` must be these three."""

    @model_validator(mode="after")
    def _names_layers_that_fit(self) -> Self:
        named = ", ".join(self.target_modules)
        if len(set(self.target_modules)) != len(self.target_modules):
            raise conflict(
                f"'method.target_modules': names a layer twice: {named}", "method.target_modules"
            )
        if self.tie_a and set(self.target_modules) != set(QUERY_KEY_VALUE):
            raise conflict(
                "'method.tie_a': true needs 'method.target_modules' "
                f"[{', '.join(QUERY_KEY_VALUE)}], which read the same input; found [{named}]",
                "method.tie_a",
                "method.target_modules",
            )
        return self


class PTuningV2(Section):
    """Trained keys and values before every layer (Liu et al. 2021, arXiv:2110.07602)."""

    kind: Literal["p_tuning_v2"]
    """The method."""
    prefix_length: int = Field(ge=1)
    """Prefix positions of every layer, in tokens."""
    projection: bool
    """Compute the prefix with a two-layer MLP from an embedding, instead of training it itself."""
    projection_size: int | None = Field(None, ge=1)
    """Hidden units of that MLP; required with `projection: true`, refused without."""
    projection_input: Literal["layer", "all"] = "layer"
    """Width of the embedding that the MLP reads: of one layer's keys, as in PEFT, or of all layers'
    keys and values, as in ChatGLM2's own code; `all` is refused without `projection: true`."""
    dropout: float = Field(ge=0, lt=1)
    """Dropout on the prefix, as a probability."""
    init: Literal["text", "random"]
    """Start from the model's own keys and values of `init_text`, or from N(0, 1)."""
    init_text: str | None = Field(None, min_length=1)
    """The text whose keys and values start the prefix; required with `init: text`."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.projection and self.projection_size is None:
            raise conflict(
                "'method.projection': true needs 'method.projection_size' (hidden units)",
                "method.projection",
                "method.projection_size",
            )
        if not self.projection and self.projection_size is not None:
            raise conflict(
                "'method.projection_size': has no effect with 'method.projection: false'; "
                "remove it",
                "method.projection",
                "method.projection_size",
            )
        if not self.projection and self.projection_input != "layer":
            raise conflict(
                "'method.projection_input': has no effect with 'method.projection: false'; "
                "remove it",
                "method.projection",
                "method.projection_input",
            )
        if self.init == "text" and self.init_text is None:
            raise conflict(
                "'method.init': text needs 'method.init_text' (the text to start from)",
                "method.init",
                "method.init_text",
            )
        if self.init == "random" and self.init_text is not None:
            raise conflict(
                "'method.init_text': has no effect with 'method.init: random'; remove it",
                "method.init",
                "method.init_text",
            )
        if self.init == "text" and self.projection:
            raise conflict(
                "'method.init': text starts the prefix itself and cannot start an MLP; "
                "use 'method.init: random' with 'method.projection: true'",
                "method.init",
                "method.projection",
            )
        return self


class ZeroShot(Section):
    """The base model as it is; nothing is trained."""

    kind: Literal["zero_shot"]
    """The method."""


class Full(Section):
    """Every weight of the base model is trained."""

    kind: Literal["full"]
    """The method."""


Method = Annotated[Lora | PTuningV2 | ZeroShot | Full, Field(discriminator="kind")]


Beta = Annotated[float, Field(ge=0, lt=1)]


class Train(Section):
    """How a model is trained: an LLM on its answer tokens only, a specialised model on its rows."""

    epochs: int = Field(ge=1)
    """Passes over the training rows."""
    batch_size: int = Field(ge=1)
    """Rows per optimiser step, over all devices and passes together; dialogues where a specialised
    model reads whole ones."""
    batch_by: Literal["row", "dialogue"] = "row"
    """What a step is filled with: single rows, or dialogues, whose turns then share their history
    in one pass. A dialogue that a step has no room for is cut between two turns."""
    micro_batch_size: int = Field(ge=1)
    """Rows of one forward pass at most. Changes memory, not the result."""
    tokens_per_pass: int | None = Field(None, ge=1)
    """Distinct tokens of one forward pass at most, beside `micro_batch_size`; without it, as many
    as those rows have. A row that has more runs alone. Changes memory, not the result."""
    learning_rate: float = Field(gt=0, le=1)
    """Peak learning rate."""
    weight_decay: float = Field(ge=0, lt=1)
    """AdamW's decoupled weight decay; of the other optimisers, an L2 penalty."""
    schedule: Literal["linear", "cosine", "constant"]
    """Course of the learning rate after the warm-up: to zero, or kept."""
    optimizer: Literal["adamw", "adam", "sgd", "sgd_momentum", "adadelta"] = "adamw"
    """The optimiser; momentum is 0.9, Adadelta's averages decay by 0.95. Only `adamw` decays
    weights apart from the gradient."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] | None = None
    """Decay rates of the two averages of `adamw` and `adam`; without it 0.9 and 0.999."""
    warmup_ratio: float = Field(ge=0, lt=1)
    """Share of all steps over which the learning rate rises from zero."""
    max_grad_norm: float = Field(gt=0)
    """Gradients are scaled down to this norm."""
    evaluations_per_epoch: int = Field(ge=1)
    """How often an epoch is measured on dev."""
    keep: Literal["best", "last"] = "best"
    """The state that a run ends with: the best that was measured on dev, or the last one, which
    dev had no part in choosing."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a better one; without it, never."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same result."""
    imbalance: Imbalance | None = None
    """What is done about rare classes; without it, every row counts the same."""

    @model_validator(mode="after")
    def _what_stops_early_keeps_the_best(self) -> Self:
        if self.keep == "last" and self.early_stopping_patience is not None:
            raise conflict(
                "'train.keep': a run that stops early is chosen by dev; take best, or remove "
                "'train.early_stopping_patience'",
                "train.keep",
                "train.early_stopping_patience",
            )
        return self

    @model_validator(mode="after")
    def _betas_belong_to_adam(self) -> Self:
        if self.betas is not None and not self.optimizer.startswith("adam"):
            raise conflict(
                f"'train.betas': {self.optimizer} has none; remove it, or take adamw or adam",
                "train.betas",
                "train.optimizer",
            )
        return self


class Inference(Section):
    """How answers are read from the model."""

    mode: Literal["score", "generate"]
    """Compare the labels' probabilities, or let the model write and parse what it wrote."""
    max_new_tokens: int = Field(ge=1)
    """Tokens that generation writes at most."""
    tokens_per_pass: int = Field(ge=1)
    """Distinct tokens of one forward pass. Changes memory, not the result."""
