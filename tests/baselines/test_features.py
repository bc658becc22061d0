"""The cache of features."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from llm_emo.baselines import features
from llm_emo.errors import JobFailed

UIDS = ["a", "b", "c"]
KEY = {"weights": "1", "max_length": 12}


class Encoder:
    """Counts how often it is asked."""

    def __init__(self, rows=3):
        self.asked = 0
        self.rows = rows

    def __call__(self):
        self.asked += 1
        return np.arange(self.rows * 4, dtype=np.float32).reshape(self.rows, 4) / 3


def run(folder, encoder, *, key=KEY, uids=UIDS):
    return features.cached(lambda: key, uids, encoder, folder=folder)


def test_the_second_time_features_come_from_the_file(tmp_path):
    encoder = Encoder()
    first, second = run(tmp_path, encoder), run(tmp_path, encoder)
    assert encoder.asked == 1
    assert np.array_equal(first, second)
    assert second.dtype == np.float32
    [file] = tmp_path.glob("*.arrow")
    table = pa.ipc.open_file(file).read_all()
    assert table.column("uid").to_pylist() == UIDS
    assert table.column("features").to_pylist() == encoder().tolist()


def test_what_is_not_to_be_kept_is_computed_without_a_key_and_leaves_no_file(tmp_path):
    encoder, cache = Encoder(), tmp_path / "cache"
    kept = run(tmp_path, encoder)

    def unasked():
        raise AssertionError("hashing weights takes long")

    with features.unkept():
        for _ in range(2):
            found = features.cached(unasked, UIDS, encoder, folder=cache)
            assert np.array_equal(found, kept)
        with pytest.raises(ValueError, match="shape"):
            features.cached(unasked, UIDS, Encoder(rows=2), folder=cache)
    assert encoder.asked == 3
    assert not cache.exists()
    run(tmp_path, encoder)
    assert encoder.asked == 3, "what was kept before is read again"


@pytest.mark.parametrize(
    "change",
    [
        {"key": KEY | {"weights": "2"}},
        {"key": KEY | {"max_length": 13}},
        {"key": KEY | {"more": None}},
        {"uids": ["a", "c", "b"]},
        {"uids": ["a", "b", "d"]},
    ],
    ids=str,
)
def test_whatever_features_depend_on_makes_another_file(change, tmp_path):
    encoder = Encoder()
    run(tmp_path, encoder)
    run(tmp_path, encoder, **change)
    assert encoder.asked == 2
    assert len(list(tmp_path.glob("*.arrow"))) == 2


@pytest.mark.parametrize("where", [0, 10, 300, -200, -1])
def test_a_damaged_file_is_made_again(where, tmp_path):
    encoder = Encoder()
    expected = np.array(run(tmp_path, encoder))
    [file] = tmp_path.glob("*.arrow")
    content = bytearray(file.read_bytes())
    content[where] ^= 0xFF
    file.write_bytes(content)
    assert np.array_equal(run(tmp_path, encoder), expected)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_made_again(kept, tmp_path):
    encoder = Encoder()
    expected = np.array(run(tmp_path, encoder))
    [file] = tmp_path.glob("*.arrow")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    assert np.array_equal(run(tmp_path, encoder), expected)
    assert encoder.asked == 2
    assert file.read_bytes() == content


def test_a_flipped_number_is_noticed(tmp_path):
    encoder = Encoder()
    expected = np.array(run(tmp_path, encoder))
    [file] = tmp_path.glob("*.arrow")
    content = file.read_bytes()
    place = content.index(expected[1].tobytes())
    file.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    assert np.array_equal(run(tmp_path, encoder), expected)
    assert encoder.asked == 2


def test_a_job_that_fails_leaves_no_file(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fail)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "_write", full)
    with pytest.raises(JobFailed, match=r"No space left.*LLM_EMO_CACHE"):
        run(tmp_path, Encoder())


def test_features_of_other_rows_are_a_fault_of_the_program(tmp_path):
    with pytest.raises(ValueError, match=r"\(2, 4\) for 3 rows"):
        run(tmp_path, Encoder(rows=2))


def test_no_rows_have_no_features(tmp_path):
    encoder = Encoder(rows=0)
    for _ in range(2):
        assert run(tmp_path, encoder, uids=[]).shape == (0, 4)


def test_the_fingerprint_changes_with_any_weight_name_or_dtype():
    def made(**changes):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        if changes.get("weight"):
            with torch.no_grad():
                model[0].weight[1, 1] += 1e-6
        if changes.get("buffer"):
            model[1].running_mean[0] = 1
        return model.to(changes.get("dtype", torch.float32))

    prints = [features.fingerprint(m) for m in (
        made(), made(weight=True), made(buffer=True), made(dtype=torch.bfloat16),
        torch.nn.ModuleDict({"x": made()}),
    )]  # fmt: skip
    assert len(set(prints)) == 5
    assert features.fingerprint(made()) == prints[0]
