"""What a job learns of the machine that it runs on."""

from pathlib import Path

import pytest

from llm_emo.machine import PeakMemory

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
