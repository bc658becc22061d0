"""ARCHITECTURE.md's table is the order in which modules may import one another."""

import ast
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

from test_text_land import SCRIPT

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llm_emo"
LINE = "**no torch above**"

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
"""Every file by its dotted name without the package's."""

EMPTY = {"__init__", "__main__", "baselines", "models"}
"""Files that hold a docstring, or one call; they stand nowhere."""


def named(pattern):
    """Return the modules that a name of the table stands for, such as `models/{auto,bundled}`."""
    pieces = [
        piece[1:-1].split(",") if piece.startswith("{") else [piece]
        for piece in re.findall(r"\{[^}]*\}|[^{}]+", pattern)
    ]
    found = set()
    for chosen in product(*pieces):
        name = "".join(chosen).replace("/", ".")
        form = re.escape(name).replace(r"\*", r"\w+") if not name.endswith(".") else None
        own = {
            known
            for known in MODULES
            if (re.fullmatch(form, known) if form else f"{known}.".startswith(name))
        }
        assert own, f"ARCHITECTURE.md names {name}, which there is not"
        found |= own
    return found


def rows():
    """Return the modules of each row of the table, from the top; None is the line."""
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    table = text.partition("| module | is |\n|---|---|\n")[2].partition("\n\n")[0]
    cells = [line.split("|")[1].strip() for line in table.splitlines()]
    return [
        None if cell == LINE else set().union(*map(named, re.findall(r"`([^`]+)`", cell)))
        for cell in cells
    ]


def imported(path):
    """Return the package's modules that a file imports when it is imported."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix("llm_emo.") for name in found if name.startswith("llm_emo.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in inside} & set(MODULES)


def test_every_module_stands_in_one_row_of_the_table():
    places = [name for row in rows() if row is not None for name in row]
    assert set(MODULES) - EMPTY - set(places) == set(), "ARCHITECTURE.md does not name them"
    assert sorted(places) == sorted(set(places))


def test_a_module_imports_only_what_stands_above_or_beside_it():
    rank = {name: place for place, row in enumerate(rows()) for name in row or ()}
    below = [
        f"{name} imports {other}"
        for name, path in sorted(MODULES.items())
        if name in rank
        for other in sorted(imported(path) - EMPTY)
        if rank[other] > rank[name]
    ]
    assert below == []


def test_what_stands_above_the_line_loads_no_torch():
    table = rows()
    above = [f"llm_emo.{name}" for row in table[: table.index(None)] for name in sorted(row)]
    assert {"llm_emo.recipes", "llm_emo.encoding", "llm_emo.models.facts"} < set(above)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *above], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
