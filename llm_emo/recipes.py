"""Recipes: one YAML 1.2 file that states everything a score depends on.

`load` reads a file (or a shipped recipe by name), applies `--set KEY=VALUE` overrides and
returns a frozen `Recipe`. Nothing is guessed: an unknown or missing key, a value of another
type or out of range, and settings that contradict each other are all reported at once, in
one `RecipeError`. A field has a default only where leaving it out says "not used"; whatever
changes a score must be written down.

Overrides: the value is YAML, so `train.learning_rate=1e-4` is a number and
`method.target_modules=[q_proj, v_proj]` a list. A section can be replaced or removed as a
whole (`'method={kind: zero_shot}'`, `train=null`). `method.kind` alone cannot be changed: the
other keys of `method` belong to the old kind.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from llm_emo import resources
from llm_emo.baselines import kinds
from llm_emo.baselines.settings import LogitAdjustment, Resampling
from llm_emo.errors import EmoError, RecipeError, nearest
from llm_emo.recipe_sections import (
    BUNDLED_MODEL,
    QUERY_KEY_VALUE,
    Data,
    Full,
    Inference,
    Limit,
    Lora,
    Method,
    Model,
    PromptChoice,
    PTuningV2,
    Train,
    ZeroShot,
)
from llm_emo.sections import Section
from llm_emo.validation import Key, Problem, conflict, found_text, problems

__all__ = (
    "BUNDLED_MODEL", "GRIDS", "QUERY_KEY_VALUE",
    "AnyRecipe", "BaselineRecipe", "Data", "Full", "Inference", "Limit", "Lora", "Method", "Model",
    "PTuningV2", "PromptChoice", "Recipe", "Train", "ZeroShot",
    "json_schema", "load", "load_llm", "names", "read_mapping", "shown_as", "source",
)  # fmt: skip

GRIDS = "grids"
"""The folder beside the recipes that holds tables of them (`llm_emo.grid`)."""


class _Common(Section):
    seed: int = Field(ge=0, lt=2**32)
    """Seed of row order, initialisation, dropout and made splits."""
    data: Data


class Recipe(_Common):
    """Everything that an LLM's score depends on, besides the corpus files themselves."""

    prompt: PromptChoice
    model: Model
    method: Method
    train: Train | None = None
    """Required for every method but `zero_shot`, which trains nothing."""
    inference: Inference

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        kind = self.method.kind
        if kind == "zero_shot" and self.train is not None:
            raise conflict(
                "'train': method zero_shot trains nothing; remove the section "
                "(on the command line: --set train=null)",
                "train",
                "method.kind",
            )
        if kind != "zero_shot" and self.train is None:
            raise conflict(f"missing section 'train': method {kind} needs it", "train", "method")
        if (
            self.train
            and self.train.tokens_per_pass is not None
            and isinstance(self.train.imbalance, LogitAdjustment)
        ):
            raise conflict(
                "'train.tokens_per_pass': counts one answer a row, and logit_adjustment puts all "
                "labels under every prompt; remove it and lower 'train.micro_batch_size'",
                "train.tokens_per_pass",
                "train.imbalance.kind",
            )
        if (
            self.train
            and self.train.batch_by == "dialogue"
            and isinstance(self.train.imbalance, Resampling)
        ):
            raise conflict(
                "'train.imbalance': resampling draws rows one by one, which parts the turns that "
                "'train.batch_by: dialogue' keeps together; use another remedy, or batch by row",
                "train.imbalance.kind",
                "train.batch_by",
            )
        if kind == "full" and self.model.quantization != "none":
            raise conflict(
                f"'model.quantization': {self.model.quantization} weights cannot be trained "
                "themselves; use none, or method lora or p_tuning_v2",
                "model.quantization",
                "method.kind",
            )
        return self


class BaselineRecipe(_Common):
    """Everything that a specialised model's score depends on, besides the corpus files."""

    method: Annotated[kinds.Kind, Field(discriminator="kind")]
    train: Train | None = None
    """Required for every method but `majority` and `linear`, which are fitted at once."""

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        method, train = self.method, self.train
        if not method.trained and train is not None:
            raise conflict(
                f"'train': method {method.kind} is fitted at once; remove the section "
                "(on the command line: --set train=null)",
                "train",
                "method.kind",
            )
        if method.trained and train is None:
            raise conflict(
                f"missing section 'train': method {method.kind} needs it", "train", "method"
            )
        if train is None:
            return self
        for key, unused in (
            ("tokens_per_pass", None),
            ("batch_by", "row"),
            ("gradient_checkpointing", False),
        ):
            if getattr(train, key) != unused:
                raise conflict(
                    f"'train.{key}': belongs to LLMs; method {method.kind} has no use for it",
                    f"train.{key}",
                    "method.kind",
                )
        if method.whole_batches and train.micro_batch_size < train.batch_size:
            raise conflict(
                f"'train.micro_batch_size': found {train.micro_batch_size}, but method "
                f"{method.kind} normalises over the rows of a step, which cannot be parted; set "
                f"it to {train.batch_size}, as 'train.batch_size'",
                "train.micro_batch_size",
                "train.batch_size",
                "method.kind",
            )
        if method.reads_dialogues and isinstance(train.imbalance, Resampling):
            raise conflict(
                f"'train.imbalance': method {method.kind} reads whole dialogues, whose turns "
                "cannot be drawn one by one; use class_weights, focal or logit_adjustment",
                "train.imbalance.kind",
                "method.kind",
            )
        if isinstance(method, kinds.Fusion) and not (method.text_run or method.audio_run):
            raise conflict(
                "'method': fusion needs 'method.text_run', 'method.audio_run' or both",
                "method.text_run",
                "method.audio_run",
            )
        return self


AnyRecipe = Recipe | BaselineRecipe


def _recipe_of(document: dict[Any, Any]) -> type[AnyRecipe]:
    """Return what a file is held against, which its method decides."""
    method = document.get("method")
    kind = method.get("kind") if isinstance(method, dict) else None
    ours = [get_args(member.model_fields["kind"].annotation)[0] for member in get_args(kinds.Kind)]
    # A misspelled name is explained best by the kinds that it resembles.
    meant = get_close_matches(str(kind), [*ours, "lora", "p_tuning_v2", "zero_shot", "full"], n=1)
    return BaselineRecipe if kind in ours or set(meant) & set(ours) else Recipe


def names() -> tuple[str, ...]:
    """Return the shipped recipes, such as `mastodon/lora`, sorted."""
    root = resources.folder("recipes")
    found = (path.relative_to(root) for path in root.rglob("*.yaml"))
    return tuple(
        sorted(path.with_suffix("").as_posix() for path in found if path.parts[0] != GRIDS)
    )


def source(path_or_name: str) -> Path:
    """Return the file that a path or the name of a shipped recipe stands for.

    Shipped recipes are found as `mastodon/lora` and `recipes/mastodon/lora.yaml` from anywhere.

    Raises:
        RecipeError: there is neither such a file nor such a shipped recipe.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    name = path_or_name.removeprefix("recipes/").removesuffix(".yaml")
    known = names()
    if name in known:
        return resources.folder("recipes") / f"{name}.yaml"
    if path.is_dir():
        raise RecipeError(f"{path_or_name}: is a folder, not a recipe file")
    close = nearest(name, known).partition(" (known")[0]
    raise RecipeError(
        f"{path_or_name}: no such file or shipped recipe; "
        + (f"{close} " if "mean" in close else "")
        + f"(recipes/README.md lists all {len(known)})"
    )


def load(path_or_name: str, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read a recipe, apply the overrides in order, and check it against prompts and protocols.

    Raises:
        RecipeError: names the file and every problem in it, or the override at fault.
    """
    path = source(path_or_name)
    shown = shown_as(path)
    document = read_mapping(path, shown, ", ".join(Recipe.model_fields))
    origins: dict[Key, str] = {}
    for override in overrides:
        _override(document, override, origins, shown)
    root = _recipe_of(document)
    try:
        recipe = root.model_validate(document)
    except ValidationError as error:
        raise _report(shown, problems(error, root), origins) from None
    if misfits := list(_misfits(recipe)):
        raise _report(shown, misfits, origins)
    return recipe


def load_llm(path_or_name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe as `load` does; one of a specialised model is refused.

    Raises:
        RecipeError: as `load`, or the recipe's method is a specialised model.
    """
    recipe = load(path_or_name, overrides)
    if isinstance(recipe, BaselineRecipe):
        raise RecipeError(
            f"{path_or_name}: method {recipe.method.kind} is a specialised model; expected an LLM"
        )
    return recipe


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe file, for editors; `recipes/schema.json` is this."""
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    either: TypeAdapter[AnyRecipe] = TypeAdapter(AnyRecipe)
    return draft | either.json_schema() | {"title": "llm_emo recipe"}


def _yaml() -> YAML:
    # The pure loader is the one that knows YAML 1.2; it also refuses duplicate keys.
    return YAML(typ="safe", pure=True)


def shown_as(path: Path) -> str:
    """Return the path as an error names it: relative where it lies under the current folder."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(path)


def read_mapping(path: Path, shown: str, keys: str) -> dict[Any, Any]:
    """Read a YAML 1.2 file that holds a mapping.

    Args:
        path: The file.
        shown: What messages call it.
        keys: The keys that are expected, for messages.

    Raises:
        RecipeError: it cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{shown}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise RecipeError(f"{shown}: cannot be read: {error.strerror}") from None
    if re.search(r"^%YAML", text, re.MULTILINE):
        # Under %YAML 1.1, `no` would be false and `1e-4` a text.
        raise RecipeError(f"{shown}: remove the %YAML line; recipes are YAML 1.2")
    document = _parse(text, shown)
    if not isinstance(document, dict):
        raise RecipeError(f"{shown}: expected a mapping of {keys}; found {found_text(document)}")
    return document


def _parse(text: str, where: str) -> object:
    try:
        return _yaml().load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise RecipeError(f"{where}: not valid YAML{at}: {problem}") from None
    except ValueError as error:  # a malformed scalar, such as the date 2024-13-45
        raise RecipeError(f"{where}: not valid YAML: {error}") from None


def _override(document: dict[Any, Any], text: str, origins: dict[Key, str], shown: str) -> None:
    """Set one `KEY=VALUE` in `document`, and note in `origins` which part of it that wrote."""
    where = f"{shown}: --set {text}"
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"{where}: expected KEY=VALUE, such as train.learning_rate=1e-4")
    parsed = _parse(value, where)
    node, written = document, tuple(keys)
    for depth, key in enumerate(keys[:-1], start=1):
        child = node.get(key)
        if child is None:
            # The override makes this section, so what is missing in it is its own doing.
            child = node[key] = {}
            written = min(written, tuple(keys[:depth]), key=len)
        if not isinstance(child, dict):
            raise RecipeError(f"{where}: '{'.'.join(keys[:depth])}' has no keys below it")
        node = child
    if keys == ["method", "kind"] and node.get("kind") != parsed:
        raise RecipeError(
            f"{where}: the other keys of 'method' belong to {node.get('kind')!r}; "
            f"set the whole section, such as --set 'method={{kind: zero_shot}}'"
        )
    node[keys[-1]] = parsed
    origins.pop(written, None)  # so that the last writer of a key also comes last
    origins[written] = text


def _report(shown: str, found: Sequence[Problem], origins: dict[Key, str]) -> RecipeError:
    lines = [_with_origin(problem, origins) for problem in found]
    if len(lines) == 1:
        return RecipeError(f"{shown}: {lines[0]}")
    return RecipeError("\n  ".join([f"{shown}: {len(lines)} problems", *lines]))


def _with_origin(problem: Problem, origins: dict[Key, str]) -> str:
    """Put in front of a problem the last override that wrote one of its keys."""
    for written, override in reversed(origins.items()):
        if any(key[: len(written)] == written for key in problem.keys):
            return f"--set {override}: {problem.text}"
    return problem.text


def _misfits(recipe: AnyRecipe) -> Iterator[Problem]:
    """Check what needs the other parts: the protocol's corpus, and what the prompt can say."""
    # Imported here: whoever only wants the schema or the names needs neither.
    from llm_emo import datasets, prompts, protocols

    data = recipe.data
    dataset_key, protocol_key = ("data", "dataset"), ("data", "protocol")
    if data.dataset not in datasets.names():
        hint = nearest(data.dataset, datasets.names())
        yield Problem(f"'data.dataset': no dataset {data.dataset!r}; {hint}", (dataset_key,))
        return
    try:
        protocol = protocols.get(data.protocol)
    except EmoError as error:
        yield Problem(f"'data.protocol': {error}", (protocol_key,))
        return
    if protocol.dataset != data.dataset:
        own = [known.name for known in protocols.of(data.dataset)]
        yield Problem(
            f"'data.protocol': {data.protocol!r} is a protocol of the dataset "
            f"{protocol.dataset!r}, not of {data.dataset!r} (its own: {', '.join(own) or 'none'})",
            (protocol_key, dataset_key),
        )
    folds = protocol.partition in ("speakers", "sessions", "random")
    if folds and data.fold is None:
        yield Problem(
            f"missing key 'data.fold': {data.protocol} is cross-validated; name the fold that is "
            "held out, from 0 on",
            (("data", "fold"), protocol_key),
        )
    if not folds and data.fold is not None:
        yield Problem(
            f"'data.fold': found {data.fold}, but {data.protocol} has no folds; remove it",
            (("data", "fold"), protocol_key),
        )
    if isinstance(recipe, BaselineRecipe):
        if recipe.method.hears and not datasets.get(data.dataset).audio:
            yield Problem(
                f"'method.kind': {recipe.method.kind} reads sound, and {data.dataset} has none",
                (("method", "kind"), dataset_key),
            )
        return
    choice, prompt_key = recipe.prompt, ("prompt", "name")
    try:
        prompt = prompts.load(choice.name)
        prompts.label_set(protocol.labels, prompt.language)
    except EmoError as error:
        yield Problem(f"'prompt.name': {error}", (prompt_key,))
        return
    if choice.history_window and prompt.turn is None:
        yield Problem(
            f"'prompt.history_window': found {choice.history_window}, but the prompt "
            f"{choice.name!r} shows no history; set it to 0",
            (("prompt", "history_window"), prompt_key),
        )


if __name__ == "__main__":
    # python -m llm_emo.recipes > recipes/schema.json
    sys.stdout.write(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n")
