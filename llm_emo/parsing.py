"""Read one label out of what a model answered, or say why there is none; never guess.

An answer gets exactly one outcome, the first that holds:

exact      the whole answer is a label's word
alias      the whole answer is an alias of a label
refusal    the model declines to answer, also where it names a label while declining
ambiguous  several labels occur, or one occurs that is negated or graded away
contained  exactly one label occurs in a longer answer (any number of times)
none       no label occurs

"Whole" is after folding (`fold`), after taking off outer punctuation, quotes and Markdown, and
in or out of the prompt's answer form. There is no matching by similarity: "fearless" is not
fear, "unhappy" is not happy, and an empty answer is not the first label of the list. Wherever
a rule cannot be sure it yields no label, and the answer counts as wrong and shows in the parse
rate.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from llm_emo.labels import LabelSet
from llm_emo.types import Outcome, Parsed

# Scripts written without spaces: their characters are no word neighbours of a label.
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_LETTER = rf"[^\W_{_UNSPACED}]"
_START, _END = rf"(?<!{_LETTER})", rf"(?!{_LETTER})"
_MASK = "\x00"  # `fold` leaves no control character but the line feed

_PUNCTUATED = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "`": "'", "_": " ", "−": " "})

_DASH = re.compile(r"(?<=\s)[-‐‑‒–]+(?=\s)|[—―]+")

# Folding has made full-width commas, colons and marks ordinary ones.
_TURN = rf"{_START}(?:but|however|therefore){_END}|但|而是|所以|因此"
_CLAUSE_START = re.compile(rf"[.,;!?\n。、]|{_TURN}")
# Behind a label a bracket or colon too ends what can negate it ("neutral (no emotion)"), and a
# question mark does not ("joy? no").
_CLAUSE_END = re.compile(rf"[.,;:!(\n。、]|{_TURN}")
_NEGATION = re.compile(
    rf"{_START}(?:not|never|no|none|nor|neither|nothing|nobody|without|non|anti|un|hardly|barely"
    r"|scarcely|lack(?:s|ed|ing)?|absence|absent|devoid|cannot|cant|aint|opposite|except"
    r"|(?:is|are|was|were|do|does|did|has|have|had|would|could|should|wo)nt|[a-z]+n't"
    rf"|rather than|instead of){_END}"
    r"|不(?!过|仅|但|错|管|论|断|同)|没(?!错)|非(?!常)|无(?!疑|论)|未(?!来)|否(?!则)|莫|≠|¬"
)
# Three words, or as many characters of a script without spaces.
_NEAR_AFTER = re.compile(rf"(?:[^\w']*(?:[{_UNSPACED}]|(?:{_LETTER}|')+)){{0,3}}")
_SUFFIX = re.compile(rf" ?(?:free|less){_END}")

_DEGREE = (
    r"(?:very|extremely|highly|strongly|really|overwhelmingly|slightly|somewhat|weakly|mildly"
    r"|moderately|fairly|quite|rather|mostly|most|more|less|a bit|a little)[ \n]"
    r"|非常|很|十分|极其|极度|强烈|有点|有些|稍微|略微|轻微|比较|较为|较|弱|更"
)
_DEGREE_AT_START = re.compile(_DEGREE)
_DEGREE_AT_END = re.compile(rf"{_START}(?:{_DEGREE})$")

_ME = r"(?:i|we)"
_DO = (
    "determine|classify|categori[sz]e|identify|tell|say|provide|assist|help|comply|answer|give|label"
    "|analy[sz]e|assess|judge|process|fulfil|fulfill|respond|understand|do"
)
_DECLINES = re.compile(
    rf"{_START}{_ME} (?:cannot|can not|can't|could not|couldn't|will not|won't) (?:{_DO}){_END}"
    rf"|{_START}(?:unable|not able|not possible|impossible) to (?:{_DO}){_END}"
    rf"|{_START}as an? (?:ai|artificial intelligence|(?:large )?language model){_END}"
    rf"|(?:cannot|can not|can't) be (?:determined|classified|categori[sz]ed|identified){_END}"
    r"|作为(?:一个|一名|一款|一种)?(?:ai|人工智能|大?语言模型|大模型|聊天机器人)"
    r"|(?:无法|不能|难以)(?:判断|确定|分类|归类|回答|识别|提供|得出|理解|给出|分析)"
)
_OPENS_BY_DECLINING = re.compile(
    rf"(?:{_ME} (?:cannot|can not|can't|won't|will not)|i'm sorry|i am sorry|sorry|my apologies"
    rf"|i apologi[sz]e|unfortunately,? {_ME}|i'm afraid {_ME}|i am afraid {_ME}"
    rf"|{_ME}(?:'m| am|'re| are) (?:unable|not able)|as an? (?:ai|language)){_END}"
    r"|(?:很|非常|十分)?(?:抱歉|对不起|遗憾)|作为一个|作为一名|(?:我|本模型)?(?:无法|不能)"
)
# "I am happy to help" says nothing about the sentence.
_COURTESY = re.compile(
    rf"{_START}(?:happy|glad|pleased|excited|delighted) to (?:{_DO}|be of){_END}"
)


def fold(text: str) -> str:
    """Return `text` as answers and labels are compared.

    NFKC (full-width forms become ordinary ones) and case folding; typographic apostrophes
    become plain; hyphens and underscores become spaces, so that "non-neutral", "Non_neutral" and
    "non neutral" are one form, and a dash between words becomes a comma; invisible format
    characters vanish; white space is one space, or one line feed where a line ended.

    >>> fold("Ｎｏｎ–Ｎｅｕｔｒａｌ")
    'non neutral'
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = _DASH.sub(", ", text.translate(_PUNCTUATED))
    text = "".join(map(_plain, text))
    # Removing an invisible character can bring a letter and its accent together.
    text = unicodedata.normalize("NFKC", text)
    return re.sub(r"\s+", lambda space: "\n" if "\n" in space.group() else " ", text).strip()


def parse(text: str, labels: LabelSet, answer: Callable[[str], str] | None = None) -> Parsed:
    """Return the label that `text` gives and how it was found.

    Args:
        text: What the model generated.
        labels: The labels that may be answered.
        answer: The prompt's answer form, `Prompt.answer`: a word within it is still exact.

    >>> labels = LabelSet(("joy", "anger"), ("Joy", "Anger"), {"angry": "anger"})
    >>> [parse(text, labels).outcome for text in ("JOY.", "angry", "It is joy", "Not angry", "")]
    ['exact', 'alias', 'contained', 'ambiguous', 'none']
    """
    before, after = ("", "")
    if answer is not None:
        before, _, after = answer(_MASK).partition(_MASK)
    table = _table(labels.names, labels.words, tuple(labels.aliases.items()), before, after)
    folded = fold(text)
    whole = table.whole.get(_core(folded))
    if whole is not None:
        return whole
    if _DECLINES.search(folded) or _OPENS_BY_DECLINING.match(_core(folded)):
        return Parsed(None, "refusal")
    return _contained(folded, table)


@dataclass(frozen=True, slots=True)
class _Table:
    """What one label set and answer form look like to the parser."""

    whole: dict[str, Parsed]
    forms: tuple[tuple[re.Pattern[str], str], ...]  # longest first, with the label's name
    graded: bool


@lru_cache(maxsize=64)
def _table(
    names: tuple[str, ...],
    words: tuple[str, ...],
    aliases: tuple[tuple[str, str], ...],
    before: str,
    after: str,
) -> _Table:
    """Prepare the surface forms of a label set within the answer form `before … after`."""
    exact = [(word, name) for name, word in zip(names, words, strict=True)]
    whole: dict[str, Parsed] = {}
    by_outcome: tuple[tuple[list[tuple[str, str]], Outcome], ...] = (
        (exact, "exact"),
        (list(aliases), "alias"),
    )
    for surfaces, outcome in by_outcome:
        for surface, name in surfaces:
            for form in (surface, f"{before}{surface}{after}"):
                whole.setdefault(_core(fold(form)), Parsed(name, outcome))
    folded = {fold(surface): name for surface, name in [*aliases, *exact]}
    longest_first = sorted(folded, key=len, reverse=True)
    return _Table(
        whole=whole,
        forms=tuple((_pattern(form), folded[form]) for form in longest_first),
        graded=any(_DEGREE_AT_START.match(fold(word)) for word in words),
    )


def _pattern(form: str) -> re.Pattern[str]:
    """Return the pattern that finds `form` as a word of its own."""
    start = _START if re.match(_LETTER, form) else ""
    end = _END if re.match(_LETTER, form[-1]) else ""
    return re.compile(start + re.escape(form).replace(r"\ ", r"[ \n]") + end)


def _contained(folded: str, table: _Table) -> Parsed:
    """Return the one label that occurs in `folded`, unless anything speaks against it."""
    rest = _COURTESY.sub(_masked, folded)
    found: set[str] = set()
    spans: list[tuple[int, int]] = []
    for pattern, name in table.forms:
        matches = list(pattern.finditer(rest))
        if matches:
            found.add(name)
            spans.extend(match.span() for match in matches)
            # Masked, so that "very positive" is not found again as "positive", and so that
            # the "non" of a label "non-neutral" negates nothing.
            rest = pattern.sub(_masked, rest)
    if not found:
        return Parsed(None, "none")
    if len(found) > 1 or any(_doubtful(rest, *span, graded=table.graded) for span in spans):
        return Parsed(None, "ambiguous")
    return Parsed(found.pop(), "contained")


def _doubtful(text: str, start: int, end: int, *, graded: bool) -> bool:
    """Return whether the mention `text[start:end]` is negated, or graded into no label.

    A negation counts anywhere before the mention in its clause, and near after it. A degree
    counts only in a set that has grades: "extremely positive" beside "very positive" and
    "positive" is neither of them for sure.
    """
    clause_start = max((match.end() for match in _CLAUSE_START.finditer(text, 0, start)), default=0)
    before = text[clause_start:start]
    clause_end = _CLAUSE_END.search(text, end)
    after = text[end : clause_end.start() if clause_end else len(text)]
    near, negation = _NEAR_AFTER.match(after), _NEGATION.search(after)
    return bool(
        _NEGATION.search(before)
        or (negation and near and negation.start() < near.end())
        or _SUFFIX.match(after)
        or (graded and _DEGREE_AT_END.search(before))
    )


def _masked(match: re.Match[str]) -> str:
    """Return a stand-in of the same length, so that positions stay true."""
    return _MASK * len(match.group())


def _plain(character: str) -> str:
    """Return a character with controls and dashes as spaces, and format characters gone."""
    if character == "\n":
        return character
    category = unicodedata.category(character)
    if category == "Cf" or "\ufe00" <= character <= "\ufe0f":
        return ""
    return " " if category in {"Cc", "Pd"} else character


def _core(folded: str) -> str:
    """Return `folded` on one line without outer punctuation, quotes, Markdown and emoji."""
    line = folded.replace("\n", " ")
    start, end = 0, len(line)
    while start < end and _is_outer(line[start]):
        start += 1
    while end > start and _is_outer(line[end - 1]):
        end -= 1
    return line[start:end]


def _is_outer(character: str) -> bool:
    """Return whether a character around an answer says nothing about it."""
    # Of the mathematical symbols only these: "≠ positive" is not positive.
    return unicodedata.category(character) in _OUTER or character in "<>=|~+$^"


_OUTER = frozenset({"Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Zs", "Zl", "Zp", "So", "Sk", "Cs"})
