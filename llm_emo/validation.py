"""Say in one clause what is wrong with data that a pydantic model refused."""

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from llm_emo.errors import nearest


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first problem of `error`: the key, what was found, what was expected.

    An unknown key comes first, because it often explains a missing one.

    >>> class Train(BaseModel, extra="forbid"):
    ...     epochs: int
    >>> try:
    ...     Train.model_validate({"epoch": 3})
    ... except ValidationError as error:
    ...     print(first_problem(error, Train))
    unknown key 'epoch'; did you mean 'epochs'? (known: epochs)
    """
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        *parents, unknown = map(str, problem["loc"])
        return f"unknown key {key!r}; {nearest(unknown, _keys(model, parents))}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    place = f"key {key!r}: " if key else ""
    return f"{place}found {_shown(problem['input'])}, expected {expected}"


def _keys(model: type[BaseModel], parents: list[str]) -> list[str]:
    """Return the keys that the model nested under `parents` knows."""
    for parent in parents:
        field = model.model_fields.get(parent)
        annotations = [] if field is None else [field.annotation, *get_args(field.annotation)]
        nested = [a for a in annotations if isinstance(a, type) and issubclass(a, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def _shown(value: Any) -> str:
    """Return `value` as a message shows it: short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
