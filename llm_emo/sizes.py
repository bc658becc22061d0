"""Sizes of memory as people write them. No torch: a wrong one is refused at once."""

import re

from llm_emo.errors import RunError

_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
          "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}  # fmt: skip


def parse_memory(text: str) -> int:
    """Return the bytes that `text`, the value of `--gpu-memory`, names.

    >>> parse_memory("24GiB"), parse_memory("1.5 GB")
    (25769803776, 1500000000)

    Raises:
        RunError: no positive number with a unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    unit = found and _UNITS.get(found[2].lower())
    if not found or not unit or float(found[1]) == 0:
        raise RunError(
            f"--gpu-memory: found {text!r}, expected a number with its unit, such as 24GiB "
            "(2^30 bytes each) or 24GB (10^9)"
        )
    return int(float(found[1]) * unit)
