"""Prompts: the text around an utterance, from `prompts/*.yaml`, and the words for its labels.

A prompt file holds text with holes. Holes are a closed set: {labels} and {text} exactly once,
{history} at most once and before {text}, {speaker} anywhere behind {history}. The text of a
corpus is put in last and never read for holes, so braces in it stay what they are.

`prompts/labels/<language>.yaml` gives each canonical label name its word and its aliases.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llm_emo import resources
from llm_emo.errors import PromptError, nearest
from llm_emo.labels import LabelSet
from llm_emo.parsing import fold
from llm_emo.types import Example, Row, Utterance
from llm_emo.validation import first_problem

_HOLE = re.compile(r"\{\s*(\w*)\s*\}")
_MESSAGE_HOLES = frozenset({"labels", "text", "speaker", "history"})
_TURN_HOLES = frozenset({"speaker", "text"})

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Listing(BaseModel):
    """What stands between the label words of the list: "A, B or C"."""

    model_config = _STRICT
    between: str
    last: str


class _History(BaseModel):
    """How the turns before the sentence are shown."""

    model_config = _STRICT
    window: Annotated[int, Field(ge=0)] | None
    turn: str


class _PromptFile(BaseModel):
    """The keys of a prompt file."""

    model_config = _STRICT
    description: str
    language: str
    message: str
    answer: str
    labels: _Listing
    history: _History | None = None
    unknown_speaker: str | None = None
    system: str | None = None


class _LabelWords(BaseModel):
    """The word and the aliases of one label."""

    model_config = _STRICT
    word: str
    aliases: list[str]


@dataclass(frozen=True)
class Prompt:
    """A prompt file, checked; made by `load`.

    `verbatim` is the file's text. `history_window` is how many earlier turns are shown where a
    caller does not say: None is the whole dialogue so far, 0 is none of it.

    The pieces (`before`, `between`, `after`, `turn`) are texts that may still hold {labels}
    and {speaker}; the history and the utterance stand between them.
    """

    name: str
    description: str
    language: str
    verbatim: str
    history_window: int | None
    answer_form: str
    system: str | None
    before: str
    between: str
    after: str
    turn: str | None
    list_between: str
    list_last: str
    unknown_speaker: str | None

    def render(self, row: Row, labels: LabelSet, *, history_window: int | None = None) -> Example:
        """Return the user's message for `row`, in pieces, and the answer it should get.

        The message carries no outer white space. Earlier turns without text are left out.

        Args:
            row: The utterance, its gold label and the turns before it.
            labels: The labels to choose from, in this prompt's language.
            history_window: How many of the last turns to show; None is the file's own number.

        Raises:
            PromptError: The utterance has no text, the labels are of another language, or a
                history is asked of a prompt that shows none.
        """
        if labels.language != self.language:
            raise PromptError(
                f"prompt {self.name}: found label words in {labels.language!r}, expected "
                f"{self.language!r}; make the label set with label_set(names, {self.language!r})"
            )
        text = row.utterance.text.strip()
        if not text:
            raise PromptError(
                f"prompt {self.name}: row {row.utterance.uid!r} has no text; leave it out of the "
                "data, there is nothing to classify"
            )
        values = {"labels": self._listing(labels.words), "speaker": self._speaker(row.utterance)}
        before = _fill(self.before, values)
        history = self._history(row, history_window)
        between = _fill(self.between, values)
        return Example(
            uid=row.utterance.uid,
            before=before,
            history=history,
            between=between if before or history else between.lstrip(),
            text=text,
            after=_fill(self.after, values),
            answer=self.answer(labels.word(row.gold)),
            gold=row.gold,
            system=self.system,
        )

    def answer(self, word: str) -> str:
        """Return the text that a model must produce for the label word `word`."""
        return _fill(self.answer_form, {"label": word})

    def _listing(self, words: Sequence[str]) -> str:
        """Return the label words as the message lists them."""
        return self.list_between.join(words[:-1]) + self.list_last + words[-1]

    def _speaker(self, utterance: Utterance) -> str:
        """Return the speaker's name on one line, or the prompt's word for an unknown one."""
        return " ".join((utterance.speaker or "").split()) or (self.unknown_speaker or "")

    def _history(self, row: Row, window: int | None) -> tuple[str, ...]:
        """Return one piece of text for each of the last `window` turns that have text."""
        if self.turn is None:
            if window:
                raise PromptError(
                    f"prompt {self.name} shows no history, but history_window is {window}; set it "
                    "to 0, or choose a prompt with {history}, such as dialogue"
                )
            return ()
        window = self.history_window if window is None else window
        if window is not None and window < 0:
            raise PromptError(
                f"prompt {self.name}: found history_window {window}, expected 0 or more turns"
            )
        spoken = [turn for turn in row.history if turn.text.strip()]
        if window is not None:
            spoken = spoken[max(0, len(spoken) - window) :]
        return tuple(
            _fill(self.turn, {"speaker": self._speaker(turn), "text": turn.text.strip()})
            for turn in spoken
        )


def names() -> tuple[str, ...]:
    """Return the names of the shipped prompts."""
    return tuple(sorted(path.stem for path in resources.folder("prompts").glob("*.yaml")))


def load(name_or_path: str | Path) -> Prompt:
    """Return the prompt of that name, or of the file at that path (`*.yaml`).

    Raises:
        PromptError: There is no such prompt, or its file is malformed.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        if not path.is_file():
            raise PromptError(
                f"no prompt file {path}; give a path that exists, or a shipped "
                f"prompt: {', '.join(names())}"
            )
    elif text in names():
        path = resources.folder("prompts") / f"{text}.yaml"
    else:
        raise PromptError(f"no prompt called {text!r}; {nearest(text, names())}")
    verbatim, data = _read_yaml(path)
    try:
        file = _PromptFile.model_validate(data)
    except ValidationError as error:
        raise PromptError(f"{path}: {first_problem(error, _PromptFile)}") from None
    return _compiled(path, file, verbatim)


def label_set(names: Sequence[str], language: str) -> LabelSet:
    """Return the labels `names`, in this order, with their words and aliases in `language`.

    A label's own word wins over another label's alias: in a set that holds both "joy" and
    "happy", the word "happy" means happy. Nothing else is settled silently.

    Raises:
        PromptError: A name has no word in that language, or two labels share a word or an alias.

    >>> label_set(("negative", "positive"), "en").words
    ('Negative', 'Positive')
    """
    known = _label_words(language)
    path = _label_path(language)
    for name in names:
        if name not in known:
            raise PromptError(f"{path}: no label {name!r}; {nearest(name, known)}")
    words: dict[str, str] = {}
    for name in names:
        other = words.setdefault(fold(known[name].word), name)
        if other != name:
            raise PromptError(
                f"{path}: the labels {other!r} and {name!r} share the word "
                f"{known[name].word!r}; they cannot stand in one set"
            )
    aliases: dict[str, str] = {}
    for name in names:
        for alias in known[name].aliases:
            folded = fold(alias)
            if folded in words:
                continue
            other = aliases.setdefault(folded, name)
            if other != name:
                raise PromptError(
                    f"{path}: the labels {other!r} and {name!r} share the alias "
                    f"{alias!r}; take it from one of them"
                )
    try:
        return LabelSet(
            names=tuple(names),
            words=tuple(known[name].word for name in names),
            aliases=MappingProxyType(aliases),
            language=language,
        )
    except ValueError as error:
        raise PromptError(f"{path}: {error}") from None


def languages() -> tuple[str, ...]:
    """Return the languages that have label words."""
    return tuple(sorted(path.stem for path in _label_path("*").parent.glob("*.yaml")))


def _compiled(path: Path, file: _PromptFile, verbatim: str) -> Prompt:
    """Check what the types of a prompt file cannot say, and cut its message into pieces."""

    def refuse(key: str, found: str, expected: str) -> PromptError:
        return PromptError(f"{path}: key {key!r}: found {found}, expected {expected}")

    if file.language not in languages():
        raise PromptError(
            f"{path}: key 'language': no label words for {file.language!r}; "
            f"{nearest(file.language, languages())}"
        )
    message = file.message.strip()
    holes = _holes(path, "message", message, _MESSAGE_HOLES)
    for hole in ("text", "labels"):
        if holes.count(hole) != 1:
            raise refuse("message", f"{{{hole}}} {holes.count(hole)} times", "it exactly once")
    if holes.count("history") != (0 if file.history is None else 1):
        raise refuse(
            "message",
            f"{{history}} {holes.count('history')} times and "
            f"{'no' if file.history is None else 'a'} key 'history'",
            "both once or neither",
        )
    if file.history is not None:
        if holes.index("history") > holes.index("text"):
            raise refuse(
                "message",
                "{history} behind {text}",
                "the history first, so that all turns of one dialogue begin with the same tokens",
            )
        if "speaker" in holes[: holes.index("history")]:
            raise refuse(
                "message",
                "{speaker} before {history}",
                "it behind the history, so that "
                "all turns of one dialogue begin with the same tokens",
            )
        turn_holes = _holes(path, "history.turn", file.history.turn, _TURN_HOLES)
        if turn_holes.count("text") != 1:
            raise refuse(
                "history.turn", f"{{text}} {turn_holes.count('text')} times", "it exactly once"
            )
        if file.history.turn != file.history.turn.lstrip():
            raise refuse("history.turn", repr(file.history.turn), "no white space at its start")
        holes = [*holes, *turn_holes]
    unknown_speaker = (file.unknown_speaker or "").strip() or None
    if "speaker" in holes and unknown_speaker is None:
        raise PromptError(
            f"{path}: missing key 'unknown_speaker'; it says what {{speaker}} "
            "shows where a corpus names none"
        )
    if _holes(path, "answer", file.answer, frozenset({"label"})) != ["label"]:
        raise refuse("answer", repr(file.answer), "{label} exactly once")
    if file.system is not None:
        _holes(path, "system", file.system, frozenset())
    before, _, rest = message.partition("{history}") if file.history else ("", "", message)
    between, _, after = rest.partition("{text}")
    return Prompt(
        name=path.stem,
        description=file.description,
        language=file.language,
        verbatim=verbatim,
        history_window=file.history.window if file.history else 0,
        answer_form=file.answer.strip(),
        system=file.system,
        before=before,
        between=between,
        after=after,
        turn=file.history.turn if file.history else None,
        list_between=file.labels.between,
        list_last=file.labels.last,
        unknown_speaker=unknown_speaker,
    )


def _holes(path: Path, key: str, text: str, allowed: frozenset[str]) -> list[str]:
    """Return the holes of `text` in order; refuse any that is not allowed there."""
    found = []
    for match in _HOLE.finditer(text):
        if match.group() != f"{{{match.group(1)}}}" or match.group(1) not in allowed:
            raise PromptError(
                f"{path}: key {key!r}: unknown hole {match.group()!r}; "
                f"{nearest(match.group(1), allowed)}"
            )
        found.append(match.group(1))
    return found


def _fill(template: str, values: dict[str, str]) -> str:
    """Return `template` with its holes filled, in one pass: values are never read for holes."""
    return _HOLE.sub(lambda match: values[match.group(1)], template)


def _label_path(language: str) -> Path:
    """Return where the label words of `language` stand."""
    return resources.folder("prompts") / "labels" / f"{language}.yaml"


def _label_words(language: str) -> dict[str, _LabelWords]:
    """Return the label words of `language`, checked."""
    if language not in languages():
        raise PromptError(f"no label words for {language!r}; {nearest(language, languages())}")
    return _read_label_words(_label_path(language))


@lru_cache(maxsize=8)
def _read_label_words(path: Path) -> dict[str, _LabelWords]:
    """Read a file of label words; no word or alias may be empty or stand twice under a name."""
    _, data = _read_yaml(path)
    if not isinstance(data, dict):
        raise PromptError(f"{path}: found {data!r}, expected labels with their words")
    words: dict[str, _LabelWords] = {}
    for name, entry in data.items():
        try:
            words[str(name)] = _LabelWords.model_validate(entry)
        except ValidationError as error:
            problem = first_problem(error, _LabelWords)
            raise PromptError(f"{path}: label {name!r}: {problem}") from None
    for name, entry in words.items():
        seen: set[str] = set()
        for surface in (entry.word, *entry.aliases):
            if not any(character.isalnum() for character in surface):
                raise PromptError(f"{path}: label {name!r}: found {surface!r}, expected a word")
            if fold(surface) in seen:
                raise PromptError(f"{path}: label {name!r}: {surface!r} stands twice")
            seen.add(fold(surface))
    return words


def _read_yaml(path: Path) -> tuple[str, Any]:
    """Return the text and the data of a YAML 1.2 file."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
        # The C loader reads YAML 1.1, where `no` is false and 1e-4 is a string.
        return text, YAML(typ="safe", pure=True).load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: cannot be read: {error}") from None
    except YAMLError as error:
        raise PromptError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
