"""The base of everything that a recipe can state: frozen, strict, and without unknown keys."""

import re
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from llm_emo.validation import conflict

T = TypeVar("T")

Many = Annotated[tuple[T, ...], Field(strict=False)]
"""A list of YAML, which becomes a tuple, so that a recipe is immutable to the bottom."""

Size = Annotated[int, Field(ge=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]

MOVING_REVISIONS = ("main", "master", "HEAD")
"""Names that stand for other weights tomorrow."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Return whether a model's name can be a Hugging Face id, `owner/name`."""
    return _HUB_ID.fullmatch(name) is not None


def require_lasting(section: str, name: str, revision: str | None) -> None:
    """Hold that a revision belongs to a Hugging Face id, and stands for the same weights tomorrow.

    Args:
        section: the recipe's, which has both as `name` and `revision`.
        name: of a model.
        revision: of a Hugging Face id; None holds.

    Raises:
        PydanticCustomError: it does not.
    """
    keys = (f"{section}.name", f"{section}.revision")
    if revision is not None and not is_hub_id(name):
        raise conflict(
            f"'{section}.revision': belongs to a Hugging Face id (owner/name), "
            f"but '{section}.name' is {name!r}; remove it",
            *keys,
        )
    if revision in MOVING_REVISIONS:
        raise conflict(
            f"'{section}.revision': {revision!r} moves; name a 40-digit commit or a tag", *keys
        )


class Section(BaseModel):
    """A mapping of a recipe file.

    A field has a default only where leaving it out says "not used", or stands for what nearly
    every recipe does, such as AdamW. No size of a network and no strength of a remedy has one.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
