"""Label sets: canonical names, the words that stand for them in a prompt, and their aliases.

One source for a label: order, text and ids all derive from a `LabelSet`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class LabelSet:
    """The k labels of a protocol in one language.

    `names` are canonical (lower-case English, the protocol's order, which is also the id
    order). `words` are what the prompt lists and the model must answer, in the same order.
    `aliases` maps further surface forms to a name.

    >>> labels = LabelSet(("negative", "positive"), ("Negative", "Positive"), {"good": "positive"})
    >>> labels.word("positive"), labels.id("positive")
    ('Positive', 1)
    """

    names: tuple[str, ...]
    words: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    language: str = "en"

    def __post_init__(self) -> None:
        if len(self.names) < 2 or len(set(self.names)) != len(self.names):
            raise ValueError(f"a label set needs at least two distinct names, got {self.names}")
        if len(self.words) != len(self.names):
            raise ValueError(f"{len(self.names)} names but {len(self.words)} words")
        folded = [word.casefold() for word in self.words]
        if len(set(folded)) != len(folded):
            raise ValueError(f"two labels share a word: {self.words}")
        taken = dict(zip(folded, self.names, strict=True))
        for alias, name in self.aliases.items():
            if name not in self.names:
                raise ValueError(f"alias {alias!r} points at {name!r}, which is not a label")
            if taken.setdefault(alias.casefold(), name) != name:
                raise ValueError(
                    f"{alias!r} stands for two labels: {taken[alias.casefold()]}, {name}"
                )

    def word(self, name: str) -> str:
        """Return the word of the label called `name`."""
        return self.words[self.names.index(name)]

    def id(self, name: str) -> int:
        """Return the position of the label called `name`."""
        return self.names.index(name)
