"""Where the shipped files are: prompts and recipes, in a checkout and in an installed wheel."""

from pathlib import Path
from typing import Literal

from llm_emo.errors import JobFailed

_PACKAGE = Path(__file__).resolve().parent


def folder(name: Literal["prompts", "recipes"]) -> Path:
    """Return the folder of the shipped prompts or recipes.

    A wheel carries them inside the package (pyproject's force-include); a checkout, and so
    an editable install, has them beside it, where they are edited.

    Raises:
        JobFailed: the installation lacks them.
    """
    installed, checkout = _PACKAGE / f"{name}_files", _PACKAGE.parent / name
    for candidate in (installed, checkout):
        if candidate.is_dir():
            return candidate
    raise JobFailed(
        f"the installation has no {name}: looked for {installed} and {checkout}; reinstall llm_emo"
    )
