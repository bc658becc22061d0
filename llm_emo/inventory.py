"""What is there: every corpus, its protocols, and the splits found under a data root."""

from collections import Counter
from pathlib import Path
from typing import Any

from llm_emo import datasets, protocols
from llm_emo.datasets.base import Corpus, Layout
from llm_emo.errors import EmoError
from llm_emo.types import Utterance


def describe(root: Path | None) -> list[dict[str, Any]]:
    """Return a JSON-able description of every corpus and of what lies under `root`.

    Fetches nothing. `protocols` has the default one first, with its classes, metrics, published
    test rows and who uses it. `splits` counts the layout that `datasets.load` takes;
    `other_layouts` the same corpus in further forms beside it. `error` is the message of a file
    that is absent or broken, else None.
    """
    return [_describe(datasets.get(name), root) for name in datasets.names()]


def _describe(corpus: Corpus, root: Path | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": corpus.name,
        "title": corpus.title,
        "language": corpus.language,
        "license": corpus.license,
        "homepage": corpus.homepage,
        "annotation": corpus.annotation,
        "audio": corpus.audio,
        "protocols": {
            protocol.name: {
                "labels": list(protocol.labels),
                "metrics": list(protocol.metrics),
                "test_rows": protocol.n_test,
                "used_by": protocol.used_by,
            }
            for protocol in protocols.of(corpus.name)
        },
        "how_to_get": corpus.how_to_get,
        "hub": corpus.hub.example if corpus.hub else None,
        "layout": None,
        "folder": None,
        "splits": {},
        "other_layouts": [],
        "error": None,
    }
    found = corpus.all_layouts(root)
    if not found and corpus.cached is not None:
        folder = corpus.cached()
        found = [(corpus.layouts[0], folder)] if folder else []
    if not found:
        entry["error"] = str(corpus.absent(root))
        return entry
    try:
        (layout, base), *others = found
        entry |= {"layout": layout.name, "folder": str(base)}
        entry["splits"] = _splits(layout, base)
        entry["other_layouts"] = [
            {"layout": other.name, "folder": str(place), "splits": _splits(other, place)}
            for other, place in others
        ]
    except EmoError as error:
        entry["error"] = str(error)
    return entry


def _splits(layout: Layout, base: Path) -> dict[str, Any]:
    return {part: _count(layout.read(base, part)) for part in layout.parts(base)}


def _count(rows: list[Utterance]) -> dict[str, Any]:
    labels = Counter(_kind(row) for row in rows)
    return {
        "utterances": len(rows),
        "dialogues": len({row.dialogue for row in rows if row.dialogue is not None}),
        "speakers": len({row.speaker for row in rows if row.speaker is not None}),
        "labels": dict(sorted(labels.items())),
    }


def _kind(row: Utterance) -> str:
    """Return the raw label, or the sign of the score."""
    if row.score is None:
        return row.label or "none"
    return "< 0" if row.score < 0 else "> 0" if row.score > 0 else "= 0"
