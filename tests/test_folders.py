"""A folder that appears when it is complete: where it may, and what is said where it may not."""

from pathlib import Path

import pytest

from llm_emo.errors import RunError
from llm_emo.folders import appearing


def refused(output, *pieces):
    """Hold that nothing is asked of the caller's work, and that nothing is left."""
    before = sorted(output.parent.parent.rglob("*"))
    with pytest.raises(RunError) as caught, appearing(output):
        raise AssertionError("work was done for an output that cannot appear")
    for piece in pieces:
        assert piece in str(caught.value)
    assert sorted(output.parent.parent.rglob("*")) == before


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stands_for_the_folder_that_it_names(tmp_path, there):
    target, link = tmp_path / "disk" / "models", tmp_path / "here" / "models"
    for folder in (target if there else target.parent, link.parent):
        folder.mkdir(parents=True)
    link.symlink_to(target)
    with appearing(link) as folder:
        assert folder.parent == target.parent, "the disk that is written is the target's"
        (folder / "weights").write_text("all", "utf-8")
    assert link.is_symlink()
    assert (link / "weights").read_text("utf-8") == "all"
    assert sorted(path.name for path in target.parent.iterdir()) == ["models"]


def test_where_a_disk_is_mounted_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "a" / "volume").mkdir(parents=True)
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "volume")
    refused(tmp_path / "a" / "volume", "mounted", "name a new folder in it")


@pytest.mark.parametrize("path", ["file/out", "file/deeper/out"])
def test_a_path_through_a_file_is_refused(tmp_path, path):
    (tmp_path / "file").write_text("", "utf-8")
    refused(tmp_path / path, "is no folder")
