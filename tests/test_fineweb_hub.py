"""scripts/prepare_fineweb.py and the Hugging Face hub, by a small server that answers as it does.

The hub's client reads its environment when it is imported, so each run is a process of its own.
"""

import hashlib
import http.server
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from gpt2_jax.data.shards import read_shards
from gpt2_jax.tokenizer import END_OF_TEXT_ID, encode

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_fineweb.py"
COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
NO_DATASETS = "rows are read by Hugging Face datasets, an optional dependency"


def names(directory):
    return sorted(file.name for file in directory.iterdir())


def tokens_in(directory):
    """All tokens of a dataset, validation first."""
    shards = [*read_shards(directory, "val", 50257), *read_shards(directory, "train", 50257)]
    return np.concatenate(shards)


def llm_c(tokens):
    header = struct.pack("<3i", 20240520, 1, len(tokens)).ljust(1024, b"\0")
    return header + np.asarray(tokens, "<u2").tobytes()


TEXTS = [f"row {n} of the hub" for n in range(100)]
CARD = """---
configs:
- config_name: small
  data_files: [{split: train, path: "small/*.jsonl"}]
- config_name: large
  data_files: [{split: train, path: "large/*.jsonl"}]
---
"""
# By repository and path.
REPOSITORIES = {
    "me/text": {
        "README.md": CARD.encode(),
        "small/0.jsonl": "".join(json.dumps({"text": t}) + "\n" for t in TEXTS[:60]).encode(),
        "small/1.jsonl": "".join(json.dumps({"text": t}) + "\n" for t in TEXTS[60:]).encode(),
        "large/0.jsonl": b'{"text": "another"}\n',
    },
    "me/shards": {
        "README.md": b"tokens",
        "fineweb_val_000000.bin": llm_c(range(100)),
        **{f"fineweb_train_{n:06d}.bin": llm_c(range(n, n + 100)) for n in range(1, 5)},
    },
    "me/other": {"train_0.bin": llm_c([60000]), "val_0.bin": llm_c([1])},
    "me/nothing": {"train_0.bin": llm_c([1])},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that data sets take: information, listing, download."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.command, self.path))
        path = unquote(self.path.split("?")[0]).removeprefix("/api").strip("/").split("/")
        repo, verb, rest = "/".join(path[1:3]), "/".join(path[3:4]), "/".join(path[5:])
        files = REPOSITORIES.get(repo)
        if files is None:
            return self.answer(404, **{"X-Error-Code": "RepoNotFound"})
        if verb in ("", "revision"):
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, {"id": repo, "sha": COMMIT, "siblings": siblings})
        if verb == "tree":
            return self.answer(200, self.listing(files, rest))
        if rest not in files:
            return self.answer(404, **{"X-Error-Code": "EntryNotFound"})
        etag = {"ETag": f'"{hashlib.sha256(files[rest]).hexdigest()}"', "X-Repo-Commit": COMMIT}
        first, last = re.findall(r"\d+", self.headers.get("Range", "")) or (0, len(files[rest]))
        body = files[rest][int(first) : int(last) + 1]
        return self.answer(206 if "Range" in self.headers else 200, body, **etag)

    do_HEAD = do_GET

    def listing(self, files, folder):
        """The files and folders that lie directly in a folder."""
        entries = {}
        for name, data in files.items():
            if name.startswith(f"{folder}/" if folder else ""):
                depth = len(Path(folder).parts) + 1
                path = "/".join(Path(name).parts[:depth])
                kind = "file" if path == name else "directory"
                oid = hashlib.sha1(path.encode()).hexdigest()
                entries[path] = {"type": kind, "path": path, "size": len(data), "oid": oid}
        return list(entries.values())

    def answer(self, code, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def hub(serve):
    with serve(Hub) as server:
        yield server


@pytest.fixture
def prepare_online(hub, tmp_path, monkeypatch):
    """Runs the script in a process that takes the stand-in for the hub."""
    monkeypatch.chdir(tmp_path)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith(("HF_", "HUGGING"))
    } | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

    def run(*flags):
        hub.requests.clear()
        command = [sys.executable, str(SCRIPT), *map(str, flags)]
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        return process.returncode, process.stdout, process.stderr

    return run


def test_a_data_set_of_the_hub_is_streamed(prepare_online, hub, tmp_path):
    pytest.importorskip("datasets", reason=NO_DATASETS)
    flags = ("--dataset", "me/text", "--name", "small", "--processes", 1)
    code, _, err = prepare_online(*flags, "--shard_tokens", 200, "--output", "out")
    assert (code, err) == (0, "")
    expected = [[END_OF_TEXT_ID, *encode(text)] for text in TEXTS]
    assert tokens_in(tmp_path / "out").tolist() == [token for each in expected for token in each]
    origin = json.loads((tmp_path / "out" / "dataset.json").read_text())["origin"]
    assert origin["revision"] == COMMIT
    # What is read is that commit, whatever becomes of the branch meanwhile.
    assert all(COMMIT in path for _, path in hub.requests[1:])


def test_shards_of_the_hub_are_downloaded_up_to_the_limit(prepare_online, hub, tmp_path):
    flags = ("--pretokenized", "me/shards", "--limit_tokens", 250, "--output", "out")
    code, out, _ = prepare_online(*flags)
    assert code == 0
    assert "300 tokens in out: 200 for training, 100 for validation" in out
    assert names(tmp_path / "out") == [
        "dataset.json",
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
        "fineweb_val_000000.bin",
    ]
    expected = [*range(100), *range(1, 101), *range(2, 102)]
    assert tokens_in(tmp_path / "out").tolist() == expected
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert description["origin"]["revision"] == COMMIT
    for shard in description["shards"]:
        data = (tmp_path / "out" / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()

    assert prepare_online(*flags)[0] == 0
    assert not any("resolve" in path for _, path in hub.requests)


def test_a_download_goes_on_with_what_is_missing(prepare_online, hub, tmp_path, monkeypatch):
    flags = ("--pretokenized", "me/shards", "--output", "out")
    with monkeypatch.context() as patch:
        patch.setitem(REPOSITORIES["me/shards"], "fineweb_train_000003.bin", b"odd")
        code, _, err = prepare_online(*flags)
    assert code == 2
    assert "out.partial/fineweb_train_000003.bin" in err
    assert not (tmp_path / "out.partial" / "fineweb_train_000003.bin").exists()
    code, out, _ = prepare_online(*flags)
    assert code == 0
    assert "500 tokens in out: 400 for training, 100 for validation" in out
    assert not any("val_000000" in path for _, path in hub.requests)
    assert len(tokens_in(tmp_path / "out")) == 500


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            ["--pretokenized", "me/other"],
            "train_0.bin holds token 60000, which GPT-2 does not have",
        ),
        (["--pretokenized", "me/nothing"], "me/nothing has no val shard"),
        (["--pretokenized", "me/unknown"], "data set me/unknown cannot be listed (404"),
        (["--dataset", "me/unknown"], "data set me/unknown cannot be opened (404"),
    ],
)
def test_what_the_hub_lacks_is_told_in_one_line(prepare_online, flags, problem):
    if "--dataset" in flags:
        pytest.importorskip("datasets", reason=NO_DATASETS)
    code, _, err = prepare_online(*flags, "--output", "out")
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert problem in err
