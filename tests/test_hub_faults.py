"""Weights from the Hugging Face hub when a download breaks off or brings something else."""

import hashlib
import types

import huggingface_hub
import numpy as np
import pytest
from hub_server import FILES, WEIGHTS, asked, hub_of, load_all, start, table, tag

from gpt2_jax.errors import UserError
from gpt2_jax.interop.hub import download

FAULTY = [
    ("gpt2", "breaks-once"),
    ("gpt2", "breaks"),
    ("gpt2", "altered"),
    ("gpt2", "altered-config"),
]


@pytest.fixture(scope="module")
def hub(serve):
    with hub_of(serve) as server:
        yield server


@pytest.fixture
def fresh_hub(serve):
    with hub_of(serve) as server:
        yield server


@pytest.fixture(scope="module")
def faulty_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("faulty")


@pytest.fixture(scope="module")
def faulty(hub, faulty_cache):
    """What the faults of the hub lead to; they end with the first download of each file."""
    return load_all(hub, faulty_cache, FAULTY)


@pytest.fixture(scope="module")
def faulty_offline(hub, faulty_cache, faulty):
    """What they leave in the cache."""
    assert faulty
    return load_all(hub, faulty_cache, FAULTY, HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def mended(hub, faulty_cache, faulty_offline):
    """The same calls when the hub is well."""
    assert faulty_offline
    return load_all(hub, faulty_cache, FAULTY)


def blobs(cache):
    """The contents that the cache has of "gpt2", by the hash it takes them for."""
    return {file.name: file for file in cache.glob("hub/models--*--gpt2/blobs/*")}


def blob_name(revision):
    return tag(WEIGHTS, FILES["gpt2", revision][WEIGHTS])


def test_a_download_that_breaks_once_goes_on_with_the_rest(hub, faulty):
    assert faulty["gpt2", "breaks-once"] == table(4.0)
    parts = [
        part
        for name, part in asked(hub, "/openai-community/gpt2/resolve/breaks-once/")
        if name == WEIGHTS
    ]
    assert parts == [None, f"bytes={10 * 2**20}-"]


def test_a_download_that_always_breaks_is_one_line(hub, faulty):
    message = faulty["gpt2", "breaks"]
    tries = [name for name, _ in asked(hub, "/openai-community/gpt2/resolve/breaks/")]
    assert 1 < tries.count(WEIGHTS) < 10
    assert message.startswith("openai-community/gpt2 cannot be downloaded (peer closed connection")
    assert message.endswith("connect, set HF_ENDPOINT, or give a local copy")
    assert "\n" not in message


def test_other_contents_than_announced_are_one_line_with_both_hashes(faulty):
    message = faulty["gpt2", "altered"]
    altered = FILES["gpt2", "altered"][WEIGHTS][:-4] + np.float32(-1.0).tobytes()
    assert f"arrived with sha256 {tag(WEIGHTS, altered)}" in message
    assert f"announced {blob_name('altered')}; it is not kept, so run this again" in message
    assert message.startswith("model.safetensors of openai-community/gpt2 ")
    assert "\n" not in message


def test_an_altered_config_is_told_by_its_git_hash(faulty):
    message = faulty["gpt2", "altered-config"]
    assert message.startswith("config.json of openai-community/gpt2 arrived with git hash ")


@pytest.mark.parametrize("revision", ["breaks", "altered", "altered-config"])
def test_neither_half_nor_altered_files_are_taken_for_the_model(faulty_offline, revision):
    assert "openai-community/gpt2 is not in the cache" in faulty_offline["gpt2", revision]


@pytest.mark.parametrize(
    ("revision", "fill"),
    [("breaks-once", 4.0), ("breaks", 5.0), ("altered", 7.0), ("altered-config", 8.0)],
)
def test_the_same_call_completes_when_the_hub_is_well(mended, revision, fill):
    assert mended["gpt2", revision] == table(fill)


def test_nothing_but_whole_files_is_left_in_the_cache(mended, faulty_cache):
    assert mended
    for name, blob in blobs(faulty_cache).items():
        contents = blob.read_bytes()
        assert name in (tag("config.json", contents), tag(WEIGHTS, contents))


def test_a_process_killed_while_it_downloads_leaves_nothing_that_is_taken(hub, tmp_path):
    models = [("gpt2", "stalls")]
    with start(hub, tmp_path, models) as process:
        assert hub.stalled.wait(60)
        process.kill()
    hub.over.set()
    assert any(name.endswith(".incomplete") for name in blobs(tmp_path))
    assert blob_name("stalls") not in blobs(tmp_path)
    assert load_all(hub, tmp_path, models) == {models[0]: table(6.0)}


def test_what_is_in_the_cache_is_not_hashed_at_each_start(hub, tmp_path):
    models = [("gpt2", None)]
    assert load_all(hub, tmp_path, models) == {models[0]: table(1.0)}
    blob = blobs(tmp_path)[blob_name("main")]
    blob.write_bytes(blob.read_bytes()[:-4] + np.float32(-1.0).tobytes())
    results = load_all(hub, tmp_path, models)
    assert results["gpt2", None][1][-1] == [1.0] * 7 + [-1.0]


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """Two files as the hub's client leaves them when it has downloaded them just now."""
    files = {}
    for name, body in FILES["gpt2", "main"].items():
        blob, files[name] = tmp_path / tag(name, body), tmp_path / name
        blob.write_bytes(body)
        files[name].symlink_to(blob.name)
    known = set()

    def bring(_repo, name, **_):
        known.add(name)
        return str(files[name])

    def cached(_repo, name, **_):
        return str(files[name]) if name in known else None

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", bring)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    return files


def test_an_interrupted_check_is_made_the_next_time(downloaded, tmp_path, monkeypatch):
    weights = downloaded[WEIGHTS]
    weights.write_bytes(weights.read_bytes()[:-4] + np.float32(-1.0).tobytes())

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            download("openai-community/gpt2")
    assert weights.exists()
    with pytest.raises(UserError, match="it is not kept"):
        download("openai-community/gpt2")
    assert {file.name for file in tmp_path.iterdir() if file.is_symlink()} == {"config.json"}
    assert not list(tmp_path.glob(blob_name("main"))) + list(tmp_path.glob("*.unchecked"))


def test_without_an_answer_of_the_hub_a_file_is_kept_but_not_taken(
    downloaded, tmp_path, monkeypatch
):
    weights, body = downloaded[WEIGHTS], downloaded[WEIGHTS].read_bytes()
    weights.unlink()
    weights.write_bytes(body)  # as without symbolic links, which say what was announced

    def announce(_url):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", announce)
    for _ in range(2):
        with pytest.raises(UserError, match=r"cannot be downloaded \(no route to the hub\)"):
            download("openai-community/gpt2")
        assert weights.read_bytes() == body
    asked_for = []
    answer = types.SimpleNamespace(etag=blob_name("main"))
    monkeypatch.setattr(
        huggingface_hub, "get_hf_file_metadata", lambda url: asked_for.append(url) or answer
    )
    for _ in range(2):
        assert download("openai-community/gpt2") == tmp_path
    assert len(asked_for) == 1
    assert not any(file.name.endswith(".unchecked") for file in tmp_path.iterdir())


def test_files_are_checked_where_there_are_no_links(fresh_hub, tmp_path):
    models = [("gpt2", "altered"), ("gpt2", "older")]
    results = load_all(fresh_hub, tmp_path, models, HF_HUB_DISABLE_SYMLINKS="1")
    again = load_all(fresh_hub, tmp_path, models, HF_HUB_DISABLE_SYMLINKS="1")
    assert blob_name("altered") in results["gpt2", "altered"]
    assert results["gpt2", "older"] == table(2.0)
    assert again["gpt2", "altered"] == table(7.0)
    assert not any(file.is_symlink() for file in tmp_path.rglob("*"))
