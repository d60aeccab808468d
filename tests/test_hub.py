"""Weights from the Hugging Face hub, by a small server that answers as the hub does.

The hub's client reads its environment when it is imported, so each load is a process of its own.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

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
try:
    params, config = load_pretrained(sys.argv[1], revision=json.loads(sys.argv[2]))
    print(json.dumps([config.n_embd, params["wte"]["embedding"].tolist()]))
except UserError as error:
    print(json.dumps(str(error)))
"""


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
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def load(hub, cache, size, revision=None, **environment):
    """Loads in a process of its own; returns [n_embd, table], or the error's text."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith(("HF_", "HUGGING"))
    }
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, size, json.dumps(revision)],
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
    return json.loads(process.stdout)


def assert_weights(result, fill):
    assert result == [8, np.full((11, 8), fill).tolist()]


def test_weights_are_downloaded_once_and_then_load_without_the_hub(hub, cache):
    assert_weights(load(hub, cache, "gpt2"), 1.0)
    downloads = [path for command, path in hub.requests if command == "GET"]
    print(hub.requests)
    assert downloads == [
        f"/openai-community/gpt2/resolve/{revision}/{name}"
        for name, revision in (("config.json", "main"), ("model.safetensors", "main"))
    ]
    hub.requests.clear()
    assert_weights(load(hub, cache, "gpt2", HF_HUB_OFFLINE="1"), 1.0)
    assert hub.requests == []


def test_a_revision_is_asked_for_as_such(hub, cache):
    hub.requests.clear()
    assert_weights(load(hub, cache, "gpt2", "older"), 2.0)
    assert hub.requests
    assert all("/resolve/older/" in path for _, path in hub.requests)


def test_a_revision_that_does_not_exist_is_named(hub, cache):
    assert "gpt2 has no revision 'newer'" in load(hub, cache, "gpt2", "newer")


def test_a_repository_that_does_not_exist_is_named(hub, cache):
    assert "no model openai-community/gpt2-medium" in load(hub, cache, "gpt2-medium")


def test_weights_in_shards_are_downloaded_whole(hub, cache):
    assert_weights(load(hub, cache, "gpt2-xl"), 3.0)
    assert_weights(load(hub, cache, "gpt2-xl", HF_HUB_OFFLINE="1"), 3.0)


def test_a_repository_without_safetensors_says_so(hub, cache):
    message = load(hub, cache, "gpt2-large")
    assert "gpt2-large" in message
    assert "\n" not in message


def test_without_cache_and_hub_one_line_says_what_to_do(hub, tmp_path):
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        message = load(hub, tmp_path, "gpt2", **environment)
        assert "openai-community/gpt2" in message
        assert "give a local copy" in message
        assert "\n" not in message
