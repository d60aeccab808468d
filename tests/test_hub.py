"""Weights from the Hugging Face hub, by a small server that answers as the hub does.

The hub's client reads its environment when it is imported, so each load is a process of its own.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save

from gpt2_jax.config import GPT2Config
from gpt2_jax.interop.huggingface import config_to_json, expected_shapes

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
CONFIG = GPT2Config(vocab_size=11, n_positions=4, n_embd=8, n_layer=1, n_head=2)
PROGRAM = """
import json, sys
from gpt2_jax.errors import UserError
from gpt2_jax.interop.pretrained import load_pretrained
results = []
for size, revision in json.loads(sys.argv[1]):
    try:
        params, config = load_pretrained(size, revision=revision)
        results.append([config.n_embd, params["wte"]["embedding"].tolist()])
    except UserError as error:
        results.append(str(error))
print(json.dumps(results))
"""
MODELS = [
    ("gpt2", None),
    ("gpt2", "older"),
    ("gpt2-xl", None),
    ("gpt2", "newer"),
    ("gpt2-medium", None),
    ("gpt2-large", None),
]


def weights(fill):
    return {
        name: np.full(shape, fill, np.float32) for name, shape in expected_shapes(CONFIG).items()
    }


def sharded_files(state):
    """Two shards and their index, as `save_pretrained` writes them for large models."""
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[:5]}
    shards["model-00002-of-00002.safetensors"] = names[5:]
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    files = {
        shard: save({name: state[name] for name in inside}) for shard, inside in shards.items()
    }
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files


CONFIG_JSON = json.dumps(config_to_json(CONFIG)).encode()
# By repository and revision.
FILES = {
    ("gpt2", "main"): {"config.json": CONFIG_JSON, "model.safetensors": save(weights(1.0))},
    ("gpt2", "older"): {"config.json": CONFIG_JSON, "model.safetensors": save(weights(2.0))},
    ("gpt2-xl", "main"): {"config.json": CONFIG_JSON, **sharded_files(weights(3.0))},
    ("gpt2-large", "main"): {"config.json": CONFIG_JSON},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves /openai-community/REPO/resolve/REVISION/FILE."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        parts = self.path.strip("/").split("/")
        self.server.requests.append((self.command, self.path))
        repo, revision, name = (parts[1], parts[3], parts[4]) if len(parts) == 5 else ("", "", "")
        files = FILES.get((repo, revision))
        if files is None:
            known = any(repo == key[0] for key in FILES)
            return self.refuse("RevisionNotFound" if known else "RepoNotFound")
        if name not in files:
            return self.refuse("EntryNotFound")
        body = files[name]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT if revision == "main" else COMMIT[::-1])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return self.wfile.write(body) if self.command == "GET" else None

    do_GET = do_HEAD

    def refuse(self, code):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def hub(serve):
    with serve(Hub) as server:
        yield server


def load_all(hub, cache, **environment):
    """Loads all `MODELS` in a process of its own: [n_embd, table], or the error's text, of each."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith(("HF_", "HUGGING"))
    }
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(MODELS)],
        env=inherited
        | {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        | environment,
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return dict(zip(MODELS, json.loads(process.stdout), strict=True))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def online(hub, cache):
    """Every model from the hub; what was asked for is in `hub.requests`."""
    return load_all(hub, cache)


@pytest.fixture(scope="module")
def offline(hub, cache, online):
    """Every model again, without the hub."""
    assert online
    before = len(hub.requests)
    results = load_all(hub, cache, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == before
    return results


def table(fill):
    return [8, np.full((11, 8), fill).tolist()]


def test_weights_come_from_the_hub_and_each_file_once(hub, online):
    assert online["gpt2", None] == table(1.0)
    downloads = [path for command, path in hub.requests if command == "GET"]
    prefix = "/openai-community/gpt2/resolve/main/"
    assert [path.removeprefix(prefix) for path in downloads if path.startswith(prefix)] == [
        "config.json",
        "model.safetensors",
    ]


def test_a_revision_is_asked_for_as_such(hub, online):
    assert online["gpt2", "older"] == table(2.0)
    revisions = {path.split("/")[4] for _, path in hub.requests}
    assert revisions == {"main", "older", "newer"}


def test_weights_in_shards_come_whole(online):
    assert online["gpt2-xl", None] == table(3.0)


def test_what_the_hub_does_not_have_is_named(online):
    assert "gpt2 has no revision 'newer'" in online["gpt2", "newer"]
    assert "no model openai-community/gpt2-medium" in online["gpt2-medium", None]
    assert "openai-community/gpt2-large" in online["gpt2-large", None]


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
    for (size, _), message in load_all(hub, tmp_path, HF_HUB_OFFLINE="1").items():
        assert f"openai-community/{size} is not in the cache" in message
        assert "give a local copy" in message
        assert "\n" not in message
