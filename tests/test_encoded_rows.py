import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pytest
import tiny

from llm_emo import encoded_rows
from llm_emo.encoded_rows import encoded
from llm_emo.encoding import Encoder

EXAMPLES = [
    tiny.example(f"the {word} was late " * times, answer, uid=f"row-{word}", history=history)
    for word, times, answer, history in [
        ("train", 1, "joy", ()),
        ("bus", 40, "anger", ()),
        ("boat", 2, "anger", ("A: hello\n", "B: where is it\n")),
    ]
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Keep every row, in a cache folder of the test's own."""
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path))
    monkeypatch.setattr(encoded_rows, "LEAST", 0)
    return tmp_path / "encoded"


@pytest.fixture
def calls(monkeypatch):
    """The examples of every call of `Encoder.encode`."""
    seen, own = [], Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, rows: seen.append(list(rows)) or own(self, rows)
    )
    return seen


def encoder(max_length=64):
    return Encoder(tiny.tokenizer(), max_length)


def files(folder):
    return sorted(folder.glob("*.arrow"))


def test_a_file_is_arrow_to_whoever_reads_it(folder):
    rows = encoded(encoder(), EXAMPLES)
    table = pa.ipc.open_stream(files(folder)[0].read_bytes()).read_all()
    assert [tuple(prompt) for prompt in table.column("prompt").to_pylist()] == [
        row.prompt for row in rows
    ]


def test_kept_rows_are_the_encoder_s_and_are_encoded_once(folder, calls):
    expected = Encoder.encode(encoder(), EXAMPLES)
    assert any(row.dropped for row in expected)
    calls.clear()
    assert encoded(encoder(), EXAMPLES) == expected
    assert encoded(encoder(), EXAMPLES) == expected
    assert len(calls) == 1
    assert len(files(folder)) == 1


def other_tokenizer(made):
    made.tokenizer.add_tokens(["zzz"])


def other_template(made):
    made.tokenizer.chat_template = "Hm. " + made.tokenizer.chat_template


@pytest.mark.parametrize(
    ("change", "examples"),
    [
        (lambda made: setattr(made, "max_length", 60), EXAMPLES),
        (other_tokenizer, EXAMPLES),
        (other_template, EXAMPLES),
        (lambda made: None, EXAMPLES[::-1]),
        (lambda made: None, EXAMPLES[:2]),
        (lambda made: None, [replace(EXAMPLES[0], text="the tram was late"), *EXAMPLES[1:]]),
        (lambda made: None, [replace(EXAMPLES[0], answer="anger"), *EXAMPLES[1:]]),
        (lambda made: None, [replace(EXAMPLES[0], uid="other"), *EXAMPLES[1:]]),
        (lambda made: None, [replace(EXAMPLES[0], system="Be brief."), *EXAMPLES[1:]]),
    ],
)
def test_whatever_changes_ids_has_a_file_of_its_own(change, examples, folder, calls):
    encoded(encoder(), EXAMPLES)
    made = encoder()
    change(made)
    calls.clear()
    rows = encoded(made, examples)
    assert len(calls) == 1
    assert rows == made.encode(examples)
    assert len(files(folder)) == 2


def test_another_end_has_a_file_of_its_own(folder):
    def without_template():
        made = encoder()
        made.tokenizer.chat_template = None
        return made

    encoded(without_template(), EXAMPLES)
    other = without_template()
    other.tokenizer.eos_token = tiny.CONTROL[0]
    assert other.end != without_template().end
    assert encoded(other, EXAMPLES) == other.encode(EXAMPLES)
    assert len(files(folder)) == 2


@pytest.mark.parametrize("other", ["transformers", "tokenizers", *encoded_rows.CODE])
def test_other_packages_and_other_code_have_a_file_of_their_own(other, folder, calls, monkeypatch):
    encoded(encoder(), EXAMPLES)
    version, hash_of = encoded_rows.metadata.version, encoded_rows.fetch.sha256_of
    monkeypatch.setattr(
        encoded_rows.metadata, "version", lambda name: "0" if name == other else version(name)
    )
    monkeypatch.setattr(
        encoded_rows.fetch, "sha256_of", lambda path: "0" if path.name == other else hash_of(path)
    )
    encoded(encoder(), EXAMPLES)
    assert (len(calls), len(files(folder))) == (2, 2)


def test_a_template_that_treats_instructions_otherwise_has_a_file_of_its_own(folder):
    # What frames a prompt without an instruction stays as it was.
    made = encoder()
    template = made.tokenizer.chat_template
    encoded(made, EXAMPLES)
    made.tokenizer.chat_template = "{% if messages[0].role == 'system' %}Hm. {% endif %}" + template
    before = encoder().fingerprint()
    assert made.fingerprint() == before
    encoded(made, EXAMPLES)
    assert len(files(folder)) == 2


def test_a_tokenizer_that_splits_special_tokens_has_a_file_of_its_own(folder):
    encoded(encoder(), EXAMPLES)
    made = encoder()
    made.tokenizer.split_special_tokens = not made.tokenizer.split_special_tokens
    encoded(made, EXAMPLES)
    assert len(files(folder)) == 2


def test_two_that_start_at_once_encode_once(calls, monkeypatch):
    expected, own = encoder().encode(EXAMPLES), Encoder.encode
    calls.clear()

    def slow(self, rows):
        time.sleep(0.5)  # the other has begun meanwhile
        return own(self, rows)

    monkeypatch.setattr(Encoder, "encode", slow)
    made = [encoder(), encoder()]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(encoded, made, [EXAMPLES, EXAMPLES])) == [expected, expected]
    assert len(calls) == 1


def test_without_a_cache_folder_rows_are_encoded(calls, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "file"))
    assert encoded(encoder(), EXAMPLES) == encoder().encode(EXAMPLES)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def empty(path):
    path.write_bytes(b"")


def other_file(path):
    table = pa.table({"prompt": [1, 2, 3]})
    with path.open("wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("damage", [truncate, empty, other_file])
def test_a_damaged_file_is_made_again(damage, folder, calls):
    expected = encoded(encoder(), EXAMPLES)
    (path,) = files(folder)
    whole = path.read_bytes()
    damage(path)
    assert encoded(encoder(), EXAMPLES) == expected
    assert len(calls) == 2
    assert path.read_bytes() == whole
    assert encoded(encoder(), EXAMPLES) == expected
    assert len(calls) == 2


def test_no_byte_that_is_wrong_is_read_as_a_row(folder):
    expected = encoded(encoder(), EXAMPLES)
    (path,) = files(folder)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        wrong = bytearray(whole)
        wrong[place] ^= 0xFF
        path.write_bytes(wrong)
        assert encoded(encoder(), EXAMPLES) == expected


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_disk_that_is_full_costs_the_file_only(stage, folder, calls, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if stage == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr("pathlib.Path.replace", full)
        rows = encoded(encoder(), EXAMPLES)
    assert len(calls) == 1
    assert rows == encoder().encode(EXAMPLES)
    assert [path.suffix for path in folder.iterdir()] in ([], [".lock"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "encoded rows are not kept: No space left on device" in err


def test_a_folder_that_cannot_be_made_costs_the_file_only(folder, capsys):
    folder.write_text("a file")
    assert encoded(encoder(), EXAMPLES) == encoder().encode(EXAMPLES)
    assert "not kept" in capsys.readouterr().err


def test_few_rows_leave_no_file(folder, monkeypatch):
    monkeypatch.setattr(encoded_rows, "LEAST", 10**6)
    assert encoded(encoder(), EXAMPLES) == encoder().encode(EXAMPLES)
    assert not folder.exists()


def test_the_file_that_was_not_used_for_longest_goes(folder, monkeypatch):
    monkeypatch.setattr(encoded_rows, "FILES", 2)
    for number, length in enumerate((60, 61)):
        encoded(encoder(length), EXAMPLES)
        for path in files(folder):
            if path.stat().st_mtime > 1000:
                os.utime(path, (number + 1, number + 1))
    first = next(path for path in files(folder) if path.stat().st_mtime == 1)
    second = next(path for path in files(folder) if path.stat().st_mtime == 2)
    encoded(encoder(60), EXAMPLES)  # used again
    encoded(encoder(62), EXAMPLES)
    assert first in files(folder)
    assert second not in files(folder)
    assert len(files(folder)) == 2
    locks = {path.name for path in folder.glob("*.lock")}
    assert f"{second.name}.lock" not in locks
