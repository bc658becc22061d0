"""Utterances as rows of a `datasets.Dataset`, and back."""

from collections.abc import Iterable, Mapping
from dataclasses import fields

from datasets import Dataset, DatasetDict, Features, List, Value

from llm_emo.datasets.base import require_whole
from llm_emo.types import Utterance

FEATURES = Features(
    {
        "uid": Value("string"),
        "text": Value("string"),
        "speaker": Value("string"),
        "dialogue": Value("string"),
        "turn": Value("int64"),
        "label": Value("string"),
        "score": Value("float64"),
        "votes": List(Value("int32")),
        "audio": Value("string"),
    }
)


def to_dataset_dict(name: str, parts: Mapping[str, Iterable[Utterance]]) -> DatasetDict:
    """Return the parts of corpus `name` as a `DatasetDict` of `FEATURES`.

    Raises:
        DatasetError: a uid occurs twice, a text is empty, or a row has both or neither of
            label and score.
    """
    tables = {part: list(rows) for part, rows in parts.items()}
    require_whole(name, tables)
    return DatasetDict({part: to_dataset(rows) for part, rows in tables.items()})


def to_dataset(rows: Iterable[Utterance]) -> Dataset:
    """Return `rows` as a dataset of `FEATURES`, held in memory."""
    rows = list(rows)
    columns = {
        field.name: [getattr(row, field.name) for row in rows] for field in fields(Utterance)
    }
    return Dataset.from_dict(columns, features=FEATURES)


def utterances(dataset: Dataset) -> list[Utterance]:
    """Return the rows of a dataset of `FEATURES` as utterances."""
    columns = {field.name: dataset[field.name][:] for field in fields(Utterance)}
    columns["votes"] = [None if votes is None else tuple(votes) for votes in columns["votes"]]
    return [
        Utterance(**dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]
