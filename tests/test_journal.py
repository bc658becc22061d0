"""Laws of journals: nothing is lost, doubled, or continued by another job."""

import errno
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_predictions import HEADER, prediction

from llm_emo import predictions
from llm_emo.errors import JobFailed, PredictionsError
from llm_emo.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "test.predictions.jsonl"


def test_a_journal_ends_in_the_order_of_the_split_and_removes_itself(path: Path) -> None:
    with Journal(path, HEADER) as journal:
        for uid in "cab":
            journal.append(prediction(uid))
        journal.finish(["a", "b", "c"])
    assert [p.uid for p in predictions.read(path)[1]] == ["a", "b", "c"]
    assert list(path.parent.iterdir()) == [path]


@given(cut=st.integers(0, 2000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_job_cut_off_at_any_byte_continues_to_the_same_file(path: Path, cut: int) -> None:
    uids = [f"uid {i} 好" for i in range(5)]
    with Journal(path, HEADER) as journal:
        journal.partial.unlink()
    with Journal(path, HEADER) as journal:
        for uid in uids:
            journal.append(prediction(uid))
    content = journal.partial.read_bytes()
    cut = min(cut, len(content))
    journal.partial.write_bytes(content[:cut])
    with Journal(path, HEADER) as again:
        assert len(again.done) == max(0, content[:cut].count(b"\n") - 1)
        assert (again.note is not None) == (cut > 0 and content[cut - 1 : cut] != b"\n")
        for uid in uids:
            if uid not in again.done:
                again.append(prediction(uid))
        again.finish(uids)
    assert predictions.read(path) == (HEADER, [prediction(uid) for uid in uids])


def test_a_journal_of_another_job_is_refused(path: Path) -> None:
    with Journal(path, HEADER) as journal:
        journal.append(prediction("a"))
    other = HEADER.model_copy(update={"adapter": "e" * 16, "mode": "score"})
    with pytest.raises(PredictionsError, match="line 1: was begun under another adapter, mode"):
        Journal(path, other)


def test_a_spoiled_complete_line_is_refused_not_dropped(path: Path) -> None:
    with Journal(path, HEADER) as journal:
        journal.append(prediction("a"))
    with journal.partial.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(PredictionsError, match="line 3: missing key 'uid'"):
        Journal(path, HEADER)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["a", "b", "c"], "1 uids have no prediction; run predict again.*the first: 'c'"),
        (["a"], "1 uids belong to no row of the split.*the first: 'b'"),
        (["a", "b", "b"], "1 uids stand twice in the split.*the first: 'b'"),
    ],
)
def test_every_uid_stands_in_the_final_file_exactly_once_or_there_is_none(
    path: Path, order: list[str], message: str
) -> None:
    with Journal(path, HEADER) as journal:
        journal.append(prediction("a"))
        journal.append(prediction("b"))
        with pytest.raises(PredictionsError, match="uid 'b': stands twice"):
            journal.append(prediction("b"))
        with pytest.raises(PredictionsError, match=message):
            journal.finish(order)
    assert not path.exists()
    assert journal.partial.exists()


def test_a_full_disk_is_one_message_and_loses_no_complete_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path, HEADER)
    journal.append(prediction("a"))
    journal.flush()
    kept = journal.partial.read_bytes()
    journal.append(prediction("b"))

    def full(self: Journal) -> None:
        self._file.write(self._pending[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_write_pending", full)
        with pytest.raises(JobFailed, match=r"cannot be written: No space left.*make room"):
            journal.flush()
    assert journal.partial.read_bytes() == kept
    journal.close()  # there is room again
    assert [p.uid for p in predictions.read(journal.partial)[1]] == ["a", "b"]


def test_a_full_disk_at_the_end_keeps_the_partial_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(path, HEADER) as journal:
        journal.append(prediction("a"))
        journal.flush()
        with monkeypatch.context() as patch:
            patch.setattr("llm_emo.journal.Journal.flush", lambda self: None)
            patch.setattr("os.fsync", full)
            with pytest.raises(JobFailed, match="No space left on device"):
                journal.finish(["a"])
    assert list(path.parent.iterdir()) == [journal.partial]
    assert JobFailed.exit_code == 1
