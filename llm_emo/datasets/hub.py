"""A corpus out of a Hugging Face dataset instead of its native files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_emo.datasets.base import Corpus
from llm_emo.errors import DatasetError, JobFailed
from llm_emo.types import Utterance

SPLIT_NAMES = {"train": "train", "dev": "validation", "test": "test"}
CONVERTED = "refs/convert/parquet"
"""The revision in which the hub keeps a Parquet copy, also of datasets that were scripts."""


def read(corpus: Corpus, hub: str, splits: Sequence[str] | None) -> dict[str, list[Utterance]]:
    """Return the splits of a dataset: `owner/name@revision`, or a local folder.

    A hub dataset moves, so its revision must be named: a commit, or refs/convert/parquet.

    Raises:
        DatasetError: the corpus has no such form, the dataset is another corpus, or lacks
            a column or a split that was asked for.
        JobFailed: the hub cannot be reached.
    """
    if corpus.hub is None:
        raise DatasetError(
            f"{corpus.name}: no Hugging Face form of this corpus is known; {corpus.how_to_get}"
        )
    reason = corpus.hub.refuse(hub, {})
    tables = {} if reason else _open(corpus, hub)
    found: dict[str, list[Utterance]] = {}
    for split, name in SPLIT_NAMES.items():
        table = tables.get(name, tables.get(split))
        if table is None or (splits is not None and split not in splits):
            continue
        reason = corpus.hub.refuse(hub, table.features)
        lost = [column for column in corpus.hub.columns if column not in table.column_names]
        if reason or lost:
            break
        found[split] = corpus.hub.read(table, split)
    else:
        lost = []
    if reason:
        raise DatasetError(f"{corpus.name}: {hub}: {reason}")
    if lost:
        there = ", ".join(table.column_names)
        raise DatasetError(
            f"{corpus.name}: {hub}: no column {lost[0]!r} (there: {there}); expected the columns "
            f"of {corpus.hub.example}"
        )
    for split in splits or ():
        if split not in found:
            raise DatasetError(
                f"{corpus.name}: {hub}: no {split} split (there: {', '.join(tables) or 'none'})"
            )
    if not found:
        raise DatasetError(f"{corpus.name}: {hub}: no split train, validation or test")
    return found


def _open(corpus: Corpus, hub: str) -> Mapping[str, Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    assert corpus.hub is not None
    name, _, revision = hub.partition("@")
    folder = Path(hub).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(str(folder)))
        if folder.is_dir():
            known = datasets.get_dataset_config_names(str(folder))
            config = corpus.hub.config if corpus.hub.config in known else None
            return dict(datasets.load_dataset(str(folder), config))
        if not revision:
            raise DatasetError(
                f"{corpus.name}: {hub} is no folder; a hub dataset needs its revision, as in "
                f"{corpus.hub.example}"
            )
        if revision == CONVERTED:  # one folder a config, and no card that lists them
            return dict(datasets.load_dataset(name, data_dir=corpus.hub.config, revision=revision))
        return dict(datasets.load_dataset(name, corpus.hub.config, revision=revision))
    except (ConnectionError, TimeoutError) as error:
        raise JobFailed(
            f"{corpus.name}: the hub cannot be reached for {hub}; download the dataset "
            f"elsewhere and name its folder, or use the native files: {corpus.how_to_get}"
        ) from error
    except (FileNotFoundError, ValueError, RuntimeError, DatasetsError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DatasetError(f"{corpus.name}: {hub}: cannot be loaded: {first}") from error
