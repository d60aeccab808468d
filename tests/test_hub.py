"""Weights from the Hugging Face hub: downloaded, cached, offline."""

import pytest
from hub_server import REFUSALS, WEIGHTS, asked, hub_of, load_all, table

MODELS = [
    ("gpt2", None),
    ("gpt2", "older"),
    ("gpt2-xl", None),
    ("gpt2", "newer"),
    ("gpt2-medium", None),
    ("gpt2-large", None),
]


@pytest.fixture(scope="module")
def hub(serve):
    with hub_of(serve) as server:
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def online(hub, cache):
    """Every model from the hub; what was asked for is in `hub.requests`."""
    return load_all(hub, cache, MODELS)


@pytest.fixture(scope="module")
def offline(hub, cache, online):
    """Every model again, without the hub."""
    assert online
    before = len(hub.requests)
    results = load_all(hub, cache, MODELS, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == before
    return results


def test_weights_come_from_the_hub_and_each_file_once(hub, online):
    assert online["gpt2", None] == table(1.0)
    files = asked(hub, "/openai-community/gpt2/resolve/main/")
    assert files == [("config.json", None), (WEIGHTS, None)]


def test_a_revision_is_asked_for_as_such(hub, cache):
    before = len(hub.requests)
    results = load_all(hub, cache, [("gpt2", "older"), ("gpt2", "newer")])
    assert results["gpt2", "older"] == table(2.0)
    revisions = {path.split("/")[4] for _, path, _ in hub.requests[before:]}
    assert revisions == {"older", "newer"}


def test_weights_in_shards_come_whole_by_redirects(hub, online):
    assert online["gpt2-xl", None] == table(3.0)
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert asked(hub, "/cdn/gpt2-xl/of/main/") == [(shard, None) for shard in shards]


def test_what_the_hub_does_not_have_is_named(online):
    assert "gpt2 has no revision 'newer'" in online["gpt2", "newer"]
    assert "no model openai-community/gpt2-medium" in online["gpt2-medium", None]
    assert "openai-community/gpt2-large is not in the cache" in online["gpt2-large", None]
    assert "or lacks a file (404" in online["gpt2-large", None]


def test_a_refusal_is_one_line_with_its_status(hub, tmp_path):
    refused = load_all(hub, tmp_path, [("gpt2", revision) for revision in REFUSALS])
    for revision, (status, _) in REFUSALS.items():
        message = refused["gpt2", revision]
        assert f"HTTP {status}" in message
        assert message.endswith("or give a local copy")
        assert "\n" not in message
    for revision in ("busy", "hurried", "forbidden"):
        assert "gpt2 is not in the cache and the hub answers" in refused["gpt2", revision]
        assert "try again later, set HF_TOKEN" in refused["gpt2", revision]
    assert "accept its terms" in refused["gpt2", "gated"]
    assert "the hub has no model openai-community/gpt2, or" in refused["gpt2", "unknown"]


@pytest.mark.parametrize(
    ("model", "fill"),
    [
        (("gpt2", None), 1.0),
        (("gpt2", "older"), 2.0),
        (("gpt2-xl", None), 3.0),
    ],
    ids=str,
)
def test_what_was_downloaded_loads_without_the_hub(offline, model, fill):
    assert offline[model] == table(fill)


def test_without_cache_and_hub_one_line_says_what_to_do(hub, tmp_path):
    for (size, _), message in load_all(hub, tmp_path, MODELS, HF_HUB_OFFLINE="1").items():
        assert f"openai-community/{size} is not in the cache" in message
        assert "give a local copy" in message
        assert "\n" not in message
