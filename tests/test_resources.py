import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llm_emo import resources
from llm_emo.errors import JobFailed

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(
    path.relative_to(ROOT)
    for folder in ("prompts", "recipes")
    for path in (ROOT / folder).rglob("*")
    if path.is_file()
)


@pytest.mark.parametrize("name", ["prompts", "recipes"])
def test_a_checkout_uses_the_files_that_one_edits(name):
    assert resources.folder(name) == ROOT / name


def test_an_installation_uses_the_files_inside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path)
    with pytest.raises(JobFailed, match=r"no recipes: looked for .*recipes_files"):
        resources.folder("recipes")
    (tmp_path / "recipes_files").mkdir()
    assert resources.folder("recipes") == tmp_path / "recipes_files"


def test_a_wheel_works_without_the_checkout(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("llm_emo-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    for path in SHIPPED:
        first, *rest = path.parts
        assert "/".join(("llm_emo", f"{first}_files", *rest)) in inside
    assert not [name for name in inside if name.startswith(("tests/", "scripts/"))]

    program = "from llm_emo import recipes as r; print(r.source('sst2/lora'), r.load('sst2/lora'))"
    shown = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    ).stdout
    assert shown.startswith(str(tmp_path / "installed" / "llm_emo" / "recipes_files"))
