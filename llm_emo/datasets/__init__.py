"""Corpora: one module each, found by looking into this folder.

    corpora = llm_emo.datasets.load("mastodon", Path("data"))   # a datasets.DatasetDict
    corpora["test"].features                                     # FEATURES of table.py
    parts = llm_emo.datasets.read("mastodon", Path("data"))     # the same rows, as utterances

A module that holds a `CORPUS` is a corpus; there is no other list of them.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_emo.datasets.base import ALL, Corpus, Layout, require_whole
from llm_emo.errors import DatasetError, nearest
from llm_emo.types import Split, Utterance

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

HELPERS = frozenset({"base", "hub", "mmsa", "table"})


@functools.cache
def _corpora() -> dict[str, Corpus]:
    modules = (
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
        if module.name not in HELPERS
    )
    return {module.CORPUS.name: module.CORPUS for module in modules}


def names() -> tuple[str, ...]:
    """Return the names of all corpora, sorted."""
    return tuple(sorted(_corpora()))


def get(name: str) -> Corpus:
    """Return the corpus called `name`.

    Raises:
        DatasetError: there is none; the message names the nearest.
    """
    try:
        return _corpora()[name]
    except KeyError:
        raise DatasetError(f"unknown dataset {name!r}; {nearest(name, names())}") from None


def load(
    name: str,
    root: Path | None,
    *,
    hub: str | None = None,
    splits: Sequence[Split] | None = None,
) -> DatasetDict:
    """Return a corpus as a `datasets.DatasetDict` with the features of `table.FEATURES`.

    Takes and raises what `read` does.
    """
    from llm_emo.datasets.table import to_dataset_dict

    return to_dataset_dict(name, _parts(name, root, hub, splits))


def read(
    name: str,
    root: Path | None,
    *,
    hub: str | None = None,
    splits: Sequence[Split] | None = None,
) -> dict[str, list[Utterance]]:
    """Return the utterances of a corpus by split.

    Args:
        name: of the corpus, which lies in `root/<name>`.
        root: the data root; None for a corpus that is fetched, or when `hub` is given.
        hub: a Hugging Face dataset instead of native files: `owner/name@revision`, or a
            local folder.
        splits: those that must be there and are read; None reads whatever is there. A
            corpus without official splits has the single key "all" in any case.

    Raises:
        DatasetError: a file is absent or malformed; the message says how to get it.
        JobFailed: a corpus that must be fetched cannot be.
    """
    parts = _parts(name, root, hub, splits)
    require_whole(name, parts)
    return parts


def _parts(
    name: str, root: Path | None, hub: str | None, splits: Sequence[Split] | None
) -> dict[str, list[Utterance]]:
    from llm_emo.datasets import hub as hub_reader

    corpus = get(name)
    if hub is not None:
        return hub_reader.read(corpus, hub, splits)
    layout, base = _locate(corpus, root)
    there = layout.parts(base)
    if ALL in there or splits is None:
        wanted: Sequence[str] = there
    else:
        wanted = splits
        for part in wanted:
            if part not in there:
                raise corpus.absent(root, part)
    return {part: layout.read(base, part) for part in wanted}


def utterances(dataset: Dataset) -> list[Utterance]:
    """Return the rows of one split of `load` as utterances."""
    from llm_emo.datasets import table

    return table.utterances(dataset)


def file_hashes(name: str, root: Path | None) -> dict[str, str]:
    """Return the SHA-256 of every file that `read` reads, by its path below the corpus.

    Of a corpus with sound, IEMOCAP's annotations are hashed and its sound is not (12 GB).
    """
    from llm_emo.fetch import sha256_of

    layout, base = _locate(get(name), root)
    paths = layout.paths(base, layout.parts(base))
    return {path.relative_to(base).as_posix(): sha256_of(path) for path in paths}


def _locate(corpus: Corpus, root: Path | None) -> tuple[Layout, Path]:
    found = corpus.find(root)
    if found is not None:
        return found
    if corpus.obtain is None:
        raise corpus.absent(root)
    return corpus.layouts[0], corpus.obtain()
