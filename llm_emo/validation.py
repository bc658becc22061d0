"""What pydantic says about a file, in the file's own terms: key path, expected, found."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from llm_emo.errors import nearest

Key = tuple[str | int, ...]
"""A path into a file: ("train", "learning_rate")."""

Section = type[BaseModel]

_EXPECTED = {
    "string_type": "a text (put it in quotes)",
    "string_too_short": "a text that is not empty",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_short": "at least one entry",
    "invalid_key": "a text as key",
}


class Problem(NamedTuple):
    """One thing that is wrong, and the keys of the file that it is about."""

    text: str
    keys: tuple[Key, ...]


def conflict(message: str, *keys: str) -> PydanticCustomError:
    """Return the error of settings that do not go together; `keys` are full dotted paths."""
    # The message goes in through the context: a template would read its braces as holes.
    return PydanticCustomError("conflict", "{text}", {"text": message, "keys": keys})


def problems(error: ValidationError, root: Section) -> list[Problem]:
    """Return every problem of a file, each once; `root` is the model it was held against."""
    details = error.errors(include_url=False)
    unknown = [item["loc"] for item in details if item["type"] == "extra_forbidden"]
    wrong = [item["loc"] for item in details]
    return [
        _explain(item, root)
        for item in details
        if not (
            # A misspelled key is one problem, not an unknown and a missing one; and a list
            # with a wrong entry is not also too short.
            (item["type"] == "missing" and _is_misspelled(item["loc"], unknown, root))
            or (item["type"] == "too_short" and any(loc[:-1] == item["loc"] for loc in wrong))
        )
    ]


def first_problem(error: ValidationError, root: Section) -> str:
    """Return the first problem; an unknown key comes first, because it often explains others.

    >>> class Train(BaseModel, extra="forbid"):
    ...     epochs: int
    >>> for content in ({"epoch": 3}, {"epochs": "x"}, None):
    ...     try:
    ...         Train.model_validate(content)
    ...     except ValidationError as error:
    ...         print(first_problem(error, Train))
    unknown key 'epoch'; did you mean 'epochs'? (known: epochs)
    'epochs': expected a valid integer, unable to parse string as an integer; found 'x' (text)
    expected a mapping of epochs; found nothing
    """
    details = error.errors(include_url=False)
    unknown = (item for item in details if item["type"] == "extra_forbidden")
    return _explain(next(unknown, details[0]), root).text


def found_text(value: object) -> str:
    """Describe a value as a file holds it.

    >>> found_text("1"), found_text(True), found_text(None), found_text([1, 2])
    ("'1' (text)", 'true (true/false)', 'nothing', 'a list of 2')
    """
    match value:
        case None:
            return "nothing"
        case dict() | list():
            return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
        case bool():
            return f"{json.dumps(value)} (true/false)"
        case str():
            return f"{value!r} (text)"
        case _:
            return str(value)


def _is_misspelled(missing: Key, unknown: Sequence[Key], root: Section) -> bool:
    hint = f"did you mean {str(missing[-1])!r}?"
    return any(
        loc[:-1] == missing[:-1] and hint in nearest(str(loc[-1]), _fields(loc[:-1], root))
        for loc in unknown
    )


def _explain(item: ErrorDetails, root: Section) -> Problem:
    location, context, found = item["loc"], item.get("ctx", {}), item["input"]
    _, key = _walk(location, root)
    name = ".".join(map(str, key))
    place = f"'{name}': " if name else ""
    match item["type"]:
        case "conflict":
            paths = cast("tuple[str, ...]", context["keys"])
            return Problem(item["msg"], tuple(tuple(path.split(".")) for path in paths))
        case "extra_forbidden":
            known = list(_fields(location[:-1], root))
            return Problem(f"unknown key '{name}'{_hint(str(key[-1]), known)}", (key,))
        case "missing":
            about = _fields(location[:-1], root).get(str(key[-1]))
            return Problem(f"missing key '{name}'" + (f" ({about})" if about else ""), (key,))
        case "union_tag_not_found":
            return Problem(f"missing key '{name}.kind' (the method)", (key,))
        case "union_tag_invalid":
            kind, kinds = str(context["tag"]), _quoted(context["expected_tags"])
            text = f"'{name}.kind': no method {kind!r}{_hint(kind, kinds)}"
            return Problem(text, (key, (*key, "kind")))
        case "literal_error":
            # Only a text can be a misspelled name.
            guess = found if isinstance(found, str) else ""
            hint = _hint(guess, _quoted(context["expected"]))
            return Problem(f"'{name}': found {found_text(found)}{hint}", (key,))
        case "model_type" | "model_attributes_type" | "dict_type":
            fields = ", ".join(_fields(location, root))
            expected = f"a mapping of {fields}" if fields else "a mapping"
            return Problem(f"{place}expected {expected}; found {found_text(found)}", (key,))
        case kind:
            expected = _EXPECTED.get(kind, item["msg"].removeprefix("Input should be "))
            return Problem(f"{place}expected {expected}; found {found_text(found)}", (key,))


def _hint(name: str, known: Sequence[str]) -> str:
    clause = nearest(name, known)
    return f" {clause}" if clause.startswith("(") else f"; {clause}"


def _quoted(text: Any) -> list[str]:
    """Return the names in pydantic's `'a', 'b' or 'c'`."""
    return re.findall(r"'([^']*)'", str(text))


def _fields(location: Key, root: Section) -> dict[str, str]:
    """Return the keys that the section at `location` knows, with the gist of each."""
    sections, _ = _walk(location, root)
    return {
        name: (field.description or "").partition(";")[0].rstrip(".")
        for section in sections
        for name, field in section.model_fields.items()
    }


def _walk(location: Key, root: Section) -> tuple[list[Section], Key]:
    """Return the sections that may stand at `location`, and the keys that lead there.

    A union with a discriminator puts the kind into the location, where the file has no key.
    """
    sections: list[Section] = [root]
    keys: list[str | int] = []
    for part in location:
        inside = [
            section
            for outer in sections
            if part in outer.model_fields
            for section in _sections_in(outer.model_fields[str(part)].annotation)
        ]
        kinds = [section for section in sections if _is_kind(section, part)]
        if not kinds:
            keys.append(part)
        sections = inside or kinds
    return sections, tuple(keys)


def _is_kind(section: Section, name: str | int) -> bool:
    kind = section.model_fields.get("kind")
    return kind is not None and name in get_args(kind.annotation)


def _sections_in(annotation: object) -> Iterator[Section]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)
