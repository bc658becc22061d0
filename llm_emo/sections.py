"""The base of everything that a recipe can state: frozen, strict, and without unknown keys."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")

Many = Annotated[tuple[T, ...], Field(strict=False)]
"""A list of YAML, which becomes a tuple, so that a recipe is immutable to the bottom."""


MOVING_REVISIONS = ("main", "master", "HEAD")
"""Names that stand for other weights tomorrow."""


class Section(BaseModel):
    """A mapping of a recipe file.

    A field has a default only where leaving it out says "not used", or where the paper that a
    network comes from prints no number.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
