"""A server on loopback that answers as the Hugging Face hub does, and processes that load from it.

The hub's client reads its environment when it is imported, so each load is a process of its own.
"""

import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import numpy as np
from safetensors.numpy import save

from gpt2_jax.config import GPT2Config
from gpt2_jax.interop.huggingface import config_to_json, expected_shapes

WEIGHTS = "model.safetensors"
PROGRAM = """
import json, sys, time
from gpt2_jax.errors import UserError
from gpt2_jax.interop.pretrained import load_pretrained
time.sleep = lambda _: None  # the client's pause before each of its retries
results = []
for size, revision in json.loads(sys.argv[1]):
    try:
        params, config = load_pretrained(size, revision=revision)
        results.append([config.n_head, params["wte"]["embedding"].tolist()])
    except UserError as error:
        results.append(str(error))
print(json.dumps(results))
"""
CONFIG = GPT2Config(vocab_size=11, n_positions=4, n_embd=8, n_layer=1, n_head=2)
# 21 MiB of weights: the hub's client writes 10 MiB at a time, and resumes where it wrote last.
LONG = GPT2Config(vocab_size=11, n_positions=700_000, n_embd=8, n_layer=1, n_head=2)


def weights(fill, config=CONFIG):
    shapes = expected_shapes(config)
    return {name: np.full(shape, fill, np.float32) for name, shape in shapes.items()}


def whole(fill, config=CONFIG):
    """The files of a repository, by name."""
    # Each has a config of its own, which the cache has not from another.
    config_json = json.dumps(config_to_json(config) | {"initializer_range": fill}).encode()
    return {"config.json": config_json, WEIGHTS: save(weights(fill, config))}


def sharded(fill):
    """Two shards and their index, as `save_pretrained` writes them for large models."""
    state, names = weights(fill), sorted(weights(fill))
    shards = {"model-00001-of-00002.safetensors": names[:5]}
    shards["model-00002-of-00002.safetensors"] = names[5:]
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    files = {
        shard: save({name: state[name] for name in inside}) for shard, inside in shards.items()
    }
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files | {"config.json": whole(fill)["config.json"]}


# By repository and revision. Some revisions fail in the way they are called.
FILES = {
    ("gpt2", "main"): whole(1.0),
    ("gpt2", "older"): whole(2.0),
    ("gpt2-xl", "main"): sharded(3.0),
    ("gpt2-large", "main"): {"config.json": whole(1.0)["config.json"]},
    ("gpt2", "breaks-once"): whole(4.0, LONG),
    ("gpt2", "breaks"): whole(5.0),
    ("gpt2", "stalls"): whole(6.0),
    ("gpt2", "altered"): whole(7.0),
    ("gpt2", "altered-config"): whole(8.0),
}
REFUSALS = {
    "busy": (503, {}),
    "hurried": (429, {}),
    "forbidden": (403, {}),
    "gated": (403, {"X-Error-Code": "GatedRepo"}),
    "unknown": (401, {"X-Error-Code": "RepoNotFound"}),
}
"""Revisions of which the hub gives nothing, and its answer."""
COMMITS = {key: hashlib.sha1("/".join(key).encode()).hexdigest() for key in FILES}
REVISIONS = {commit: revision for (_, revision), commit in COMMITS.items()}
REDIRECTED = "gpt2-xl"
"""The repository whose weights lie elsewhere, as all large files on the hub do."""


def tag(name, body):
    """The hub's ETag: of weights their sha256, of other files the hash git gives them."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(body).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves /openai-community/REPO/resolve/REVISION/FILE and /cdn/REPO/of/REVISION/FILE.

    `server.requests` has each command, path and Range. A faulty revision is whole from the
    second HEAD of a file on: each of the client's downloads, of however many tries, has one.
    """

    protocol_version = "HTTP/1.1"
    files = FILES

    def do_HEAD(self):
        self.server.requests.append((self.command, self.path, self.headers["Range"]))
        parts = self.path.strip("/").split("/")
        site, repo, _, revision, name = parts if len(parts) == 5 else [""] * 5
        revision = REVISIONS.get(revision, revision)
        files = self.files.get((repo, revision))
        if revision in REFUSALS:
            self.reply(*REFUSALS[revision])
        elif files is None:
            known = any(repo == key[0] for key in self.files)
            self.reply(404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        elif name not in files:
            self.reply(404, {"X-Error-Code": "EntryNotFound"})
        elif site == "cdn":
            self.send(revision, name, files[name], {"ETag": '"the tag of another house"'})
        elif repo == REDIRECTED and name.endswith(".safetensors"):
            # To another host: the client follows a redirect on the same one.
            elsewhere = f"http://localhost:{self.server.server_port}"
            self.reply(
                302,
                {
                    "Location": f"{elsewhere}/cdn/{repo}/of/{revision}/{name}",
                    "X-Repo-Commit": COMMITS[repo, revision],
                    "X-Linked-Etag": f'"{tag(name, files[name])}"',
                    "X-Linked-Size": len(files[name]),
                    "ETag": '"the tag of a redirect"',
                },
            )
        else:
            tags = {"ETag": f'"{tag(name, files[name])}"', "X-Repo-Commit": COMMITS[repo, revision]}
            self.send(revision, name, files[name], tags)

    do_GET = do_HEAD

    def send(self, revision, name, body, headers):
        """The file or the rest of it that is asked for, with the revision's fault."""
        size, end = len(body), len(body)
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])
        so_far = [command for command, path, *_ in self.server.requests if path == self.path]
        at_fault = name == (WEIGHTS if revision != "altered-config" else "config.json")
        fault = revision if at_fault and so_far.count("HEAD") < 2 else ""
        if fault == "altered":
            body = body[:-4] + np.float32(-1.0).tobytes()
        if fault == "altered-config":
            body = body.replace(b'"n_head": 2', b'"n_head": 4')
        if fault in ("breaks", "stalls") or (fault == "breaks-once" and so_far.count("GET") == 1):
            end = size * 2 // 3
        if start:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.reply(206 if start else 200, headers, body[start:end], size - start)
        if self.command == "GET" and fault == "stalls":
            self.server.stalled.set()
            self.server.over.wait(60)

    def reply(self, status, headers, body=b"", length=0):
        """Closes the connection early if the body is shorter than the length."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": length}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.close_connection = len(body) < length

    def log_message(self, *_):
        """Nothing on stderr."""


@contextlib.contextmanager
def hub_of(serve):
    """A hub of which nothing has been asked yet."""
    with serve(Hub) as server:
        server.stalled, server.over = threading.Event(), threading.Event()
        yield server
        server.over.set()


def start(hub, cache, models, **environment):
    """Starts a process that loads models by size and revision."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith(("HF_", "HUGGING"))
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(models)],
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
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def load_all(hub, cache, models, **environment):
    """Of each model [n_head, table], or the error's text; by size and revision."""
    with start(hub, cache, models, **environment) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return dict(zip(models, json.loads(out), strict=True))


def asked(hub, prefix):
    """Files that were got from under a path, in order, and the Range of each request."""
    return [
        (path.removeprefix(prefix), part)
        for command, path, part in hub.requests
        if command == "GET" and path.startswith(prefix)
    ]


def table(fill):
    return [2, np.full((11, 8), fill).tolist()]
