"""The device: what it is, and how much of its memory may be used."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gpu_check.turns import say

GIB = 2**30


def cap(device: torch.device, gib: float) -> dict[str, int] | None:
    """Let this process take at most `gib` GiB of the device's memory; return what was set.

    The cap holds for everything that torch's allocator hands out, which is all but the few
    hundred MB that the driver takes for the process itself. On a CPU there is none.
    """
    if device.type != "cuda":
        return None
    torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)
    limit = min(int(gib * GIB), total)
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    if free < limit:
        say(
            f"    note: of {limit / GIB:.1f} GiB only {free / GIB:.1f} are free; another process "
            "holds memory of this device"
        )
    return {"cap": limit, "total": total, "free_at_start": free}


def outside_allocator(device: torch.device) -> int:
    """Return the bytes in use that torch's allocator does not hold: the driver's, and others'."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


def facts(device: torch.device) -> dict[str, Any]:
    """Return what the device is, for the record."""
    if device.type != "cuda":
        return {"type": "cpu", "name": _cpu(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "rocm" if torch.version.hip else "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "total_memory": properties.total_memory,
        "native_bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF")
        or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "cpu": _cpu(),
    }


def _driver() -> str | None:
    """Return the versions of the drivers that nvidia-smi sees, if it is there."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = {line.strip() for line in done.stdout.splitlines() if line.strip()}
    return ", ".join(sorted(lines)) if done.returncode == 0 and lines else None


def _cpu() -> str:
    if sys.platform == "linux":
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8"))
        if found:
            return found[1]
    return platform.processor() or platform.machine()
