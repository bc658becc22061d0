"""Environments for peers whose packages cannot stand beside this program's."""

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from common import harness


def python_of(
    name: str,
    requirements: Sequence[str],
    *,
    constraints: Sequence[str] = (),
    without: Sequence[str] = (),
) -> Path:
    """Return the Python of an environment that has a peer's requirements, made on first use.

    Args:
        name: The environment's name, under `build/bench` of the checkout.
        requirements: What to install.
        constraints: Further versions to hold to, as pip writes them.
        without: Packages to take away again afterwards.

    Packages of this Python are seen from there, torch above all; what the peer pins otherwise is
    installed there, where it shadows them, and changes nothing here.

    Raises:
        JobFailed: they cannot be installed; the message ends with pip's own.
    """
    from llm_emo.errors import JobFailed

    folder = harness.ROOT / "build" / "bench" / name
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = folder / "complete"
    wanted = "\n".join([*requirements, *constraints, *without])
    if done.exists() and done.read_text("utf-8") == wanted:
        return python
    harness.tell(f"{folder}: installing {', '.join(requirements)}")
    venv.create(folder, clear=True, with_pip=True)
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in here]
    (_site_packages(python) / "parent.pth").write_text("\n".join(lines) + "\n", "utf-8")
    held = folder / "constraints.txt"
    held.write_text("".join(f"{line}\n" for line in constraints), "utf-8")
    command = [python, "-m", "pip", "install", "--quiet", "-c", held, *requirements]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if installed.returncode:
        tail = " ".join(installed.stderr.strip().splitlines()[-6:])
        raise JobFailed(f"{name}: {', '.join(requirements)} cannot be installed: {tail}")
    if without:
        command = [python, "-m", "pip", "uninstall", "--quiet", "--yes", *without]
        subprocess.run(command, capture_output=True, check=True)
    done.write_text(wanted, "utf-8")
    return python


def _site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())
