"""What a job learns of the machine that it runs on."""

import gc
import weakref
from pathlib import Path

import pytest

from llm_emo.machine import PeakMemory, settled

MIB = 2**20


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a peak"
)
def test_a_peak_counts_from_its_beginning_on():
    held = bytearray(300 * MIB)
    with_much = PeakMemory.begin().read()
    del held
    peak = PeakMemory.begin()
    begun_with = peak.read()
    assert begun_with < with_much - 200 * MIB
    held = bytearray(100 * MIB)
    del held
    assert 90 * MIB < peak.read() - begun_with < 150 * MIB


def test_a_system_that_cannot_begin_anew_tells_no_peak(monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    assert PeakMemory().read() is None
    monkeypatch.setattr(Path, "write_text", refuse)
    assert PeakMemory.begin().read() is None


class _Ring:
    def __init__(self):
        self.itself = self


@pytest.mark.parametrize("fails", [False, True])
def test_what_exists_is_kept_out_of_walks_for_garbage_until_the_end(fails):
    gc.unfreeze()
    before, old = weakref.ref(_Ring()), _Ring()
    kept = weakref.ref(old)
    try:
        with settled():
            assert before() is None  # garbage already
            assert gc.get_freeze_count() > 0
            del old
            new = weakref.ref(_Ring())
            gc.collect()
            assert kept() is not None
            assert new() is None
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert kept() is None


def test_what_others_froze_stays_frozen():
    gc.freeze()
    try:
        with settled():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
