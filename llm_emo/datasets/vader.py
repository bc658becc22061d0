"""VADER's rated texts: tweets, film and product reviews, newspaper; means from -4 to 4.

They come inside the sdist of the package vaderSentiment (MIT), which pip fetches at first
use; nothing of the package is installed. The uid is the source and the published id. A
product review and a newspaper editorial are documents of several sentences: `dialogue`,
with `turn` the number of the sentence. Tweets and film snippets stand alone, and their
source stands in the uid only. `votes` are the single ratings (15 to 99 a text) where their
mean is the published one; for 199 tweets it is not, and they have none.

Text is kept as published (`&amp;` stays). 84 rows repeat the text of another.
"""

import json
import os
import re
import tarfile
import tempfile
from pathlib import Path
from typing import IO

from filelock import FileLock

from llm_emo import fetch
from llm_emo.datasets.base import (
    ALL,
    Corpus,
    Layout,
    malformed,
    parse_count,
    parse_number,
    parse_text,
    read_json,
    read_lines,
)
from llm_emo.errors import DatasetError, JobFailed
from llm_emo.types import Utterance

SOURCES = {
    "tweets": "tweets",
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "newspaper": "nytEditorialSnippets",
}
TEXTS = tuple(f"{stem}_GroundTruth.txt" for stem in SOURCES.values())
RATINGS = tuple(f"{stem}_anonDataRatings.txt" for stem in SOURCES.values())

RATING = re.compile(r"([^\t]+)\t[^\t]*\t[^\t]*\t\[( *-?[0-9] *(?:, *-?[0-9] *)*)\]\s*")
"""A line of ratings: id, mean, deviation, and the list. Not all white space is some to `int`."""

ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
MANIFEST = "sha256.json"


def read(base: Path, part: str) -> list[Utterance]:
    """Read the four files of rated texts."""
    return [row for source in SOURCES for row in read_source(base, source)]


def read_source(base: Path, source: str) -> list[Utterance]:
    """Read one file of rated texts, with the single ratings where their file is there."""
    path = base / f"{SOURCES[source]}_GroundTruth.txt"
    ratings = _ratings(base / f"{SOURCES[source]}_anonDataRatings.txt")
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        where = f"line {number}"
        cells = line.split("\t")
        if len(cells) != 3:
            raise malformed(path, where, line, "id, mean and text, parted by tabs")
        name, mean, text = cells
        document, _, sentence = name.partition("_")
        score = parse_number(path, where, mean, -4.0, 4.0)
        votes = ratings.get(name)
        # A mean of other ratings than the published mean: the join would be a guess.
        if votes is not None and abs(sum(votes) / len(votes) - score) > 1e-3:
            votes = None
        rows.append(
            Utterance(
                uid=f"{source}/{name}",
                text=parse_text(path, where, text),
                dialogue=f"{source}/{document}" if sentence else None,
                turn=parse_count(path, where, sentence) if sentence else None,
                score=score,
                votes=votes,
            )
        )
    return rows


def _ratings(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        return {}
    ratings = {}
    for number, line in enumerate(read_lines(path), 1):
        match = RATING.fullmatch(line)
        if match is None:
            expected = "id, mean, deviation and a list of ratings, parted by tabs"
            raise malformed(path, f"line {number}", line, expected)
        ratings[match[1]] = tuple(int(vote) for vote in match[2].split(","))
    return ratings


def cached() -> Path | None:
    """Return the folder of a former `obtain` when its files are as they were written."""
    folder = fetch.cache_dir() / "vader-3.3.2"
    if not (folder / MANIFEST).is_file():
        return None
    try:
        hashes = read_json(folder / MANIFEST)
    except DatasetError:  # damaged: fetched again
        return None
    # Other files do no harm: a file manager may leave one of its own here.
    intact = (
        isinstance(hashes, dict)
        and set(hashes) == set(TEXTS + RATINGS)
        and all(
            (folder / name).is_file() and fetch.sha256_of(folder / name) == hashes[name]
            for name in hashes
        )
    )
    return folder if intact else None


def obtain() -> Path:
    """Return the folder with the eight files, fetched through pip unless it is cached.

    Only the named members of the archive are read, each into a file of its own name; the
    folder appears under its final name when it is complete.

    Raises:
        JobFailed: the sdist cannot be fetched, or the disk is full.
    """
    found = cached()
    if found is not None:
        return found
    sdist = fetch.pip_download(fetch.VADER, fetch.VADER_SHA256, source=True)
    folder = fetch.cache_dir() / "vader-3.3.2"
    try:
        with FileLock(f"{folder}.lock"):
            found = cached()
            if found is not None:
                return found
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="vader-") as name:
                unpacked = Path(name) / "files"
                unpacked.mkdir()
                unpack(sdist, unpacked)
                if folder.exists():  # damaged: cached() refused it
                    folder.rename(Path(name) / "damaged")
                unpacked.rename(folder)
    except OSError as error:
        raise JobFailed(f"{folder}: {error.strerror or error}; is the disk full?") from error
    return folder


def unpack(sdist: Path, folder: Path) -> None:
    """Write the eight files of the sdist's inner archive and their manifest into `folder`."""
    try:
        with (
            tarfile.open(sdist) as outer,
            tarfile.open(fileobj=_member(outer, ARCHIVE, sdist)) as inner,
        ):
            for name in TEXTS + RATINGS:
                (folder / name).write_bytes(_member(inner, name, sdist).read())
    except (tarfile.TarError, EOFError) as error:
        raise DatasetError(f"{sdist}: is no complete archive ({error}); delete it") from error
    hashes = {name: fetch.sha256_of(folder / name) for name in TEXTS + RATINGS}
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(hashes, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _member(archive: tarfile.TarFile, ending: str, sdist: Path) -> IO[bytes]:
    """Return the one plain file below the archive's top folder that is called `ending`."""
    for entry in archive:
        if entry.isfile() and entry.name.partition("/")[2] == ending:
            stream = archive.extractfile(entry)
            if stream is not None:
                return stream
    raise DatasetError(f"{sdist}: has no {ending}; is it vaderSentiment 3.3.2?")


CORPUS = Corpus(
    name="vader",
    title="VADER's rated texts",
    language="en",
    license="MIT",
    homepage="https://github.com/cjhutto/vaderSentiment",
    how_to_get=(
        "it arrives by itself: pip fetches the sdist of vaderSentiment 3.3.2 at first use; or "
        f"unpack {ARCHIVE} of that sdist into the folder vader"
    ),
    annotation="sentiment of a text, mean of at least 15 ratings from -4 to 4",
    layouts=(
        Layout(
            name="ICWSM 2014 files",
            files={ALL: TEXTS},
            read=read,
            bases=(".", "hutto_ICWSM_2014"),
            extra=RATINGS,
        ),
    ),
    obtain=obtain,
    cached=cached,
)
