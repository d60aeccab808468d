"""Where the commands of the documents run: a reader's checkout in small, with a hub on loopback.

Configs train one narrow layer for twelve steps. What the documents call FILE, mine.txt or
path/to/adapter is there by that name. The hub has a random model of GPT-2's vocabulary as gpt2,
and a few rows and shards as FineWeb-Edu. Nothing else can be reached.
"""

import contextlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import hub_server
import jax
import test_fineweb_hub
from documented_blocks import ROOT

from gpt2_jax.config import GPT2Config
from gpt2_jax.interop.export import export_model
from gpt2_jax.interop.peft import save_adapter
from gpt2_jax.lora import init_lora
from gpt2_jax.lora_settings import LoraSettings
from gpt2_jax.model import init_params

TIME_LIMIT = 180
"""seconds for a command"""
TOO_LONG = 124

# Appended to each config.
CUT_DOWN = """
from dataclasses import replace as _replace

config = _replace(
    config,
    steps=12,
    model=_replace(config.model, n_embd=16, n_layer=1, n_head=2),
    data=_replace(config.data, sequence_length=64, batch_size=8, micro_batch_size=1),
    optimizer=_replace(config.optimizer, warmup_steps=2),
    validation=_replace(config.validation, windows=8),
    samples=_replace(config.samples, count=1, max_new_tokens=4),
)
"""
MODEL = GPT2Config(n_embd=16, n_layer=1, n_head=2)
SORTER = GPT2Config(vocab_size=3, n_positions=11, n_embd=6, n_layer=1, n_head=3, eos_token_id=None)
FOLDERS_OF_TEXT = ("FOLDER", "FILE_OR_FOLDER")
FILES_OF_TEXT = ("FILE", "mine.txt", "novels.txt", "novel.txt", "held_out.txt")
ADAPTERS = ("path/to/adapter", "adapters/recipes", "adapters/sonnets")


def _shared(name: str) -> Path | None:
    """A file that others published, where `GPT2_JAX_SHARED` names their folder."""
    folder = os.environ.get("GPT2_JAX_SHARED")
    return Path(folder) / name if folder else None


class Hub(hub_server.Hub, test_fineweb_hub.Hub):
    """Both halves of the hub: models, and data sets."""

    def by_half(self):
        half = test_fineweb_hub.Hub if "/datasets/" in self.path else hub_server.Hub
        half.do_HEAD(self)

    do_GET = do_HEAD = by_half


@contextlib.contextmanager
def _hub(model: Path) -> Iterator[int]:
    """Serves a model directory as gpt2; yields the port."""
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    handler = type("Hub", (Hub,), {"files": {("gpt2", "main"): files}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.requests = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


ROWS = "".join(json.dumps({"text": f"{n}. {topics['if']}"}) + "\n" for n in range(10))
test_fineweb_hub.REPOSITORIES |= {
    "HuggingFaceFW/fineweb-edu": {
        "README.md": b"---\nconfigs:\n- config_name: sample-10BT\n  data_files: "
        b'[{split: train, path: "sample/*.jsonl"}]\n---\n',
        "sample/0.jsonl": ROWS.encode(),
    },
    "kjj0/finewebedu10B-gpt2": {
        "edu_fineweb_val_000000.bin": test_fineweb_hub.llm_c(range(2000)),
        "edu_fineweb_train_000001.bin": test_fineweb_hub.llm_c(range(2000)),
    },
}


@contextlib.contextmanager
def prepared() -> Iterator[tuple[Path, Path]]:
    """A reader's checkout to copy, and a folder for the copies; with the hub for as long."""
    with tempfile.TemporaryDirectory(prefix="gpt2_jax-documents-") as temporary:
        folder = Path(temporary)
        template = folder / "template"
        _write_sources(template)
        _write_texts(template)
        _write_models(template)
        with _hub(template / "path/to/huggingface_directory") as port:
            _write_environment(template, folder, port)
            _train_once(template)
            yield template, folder


def _write_sources(template: Path) -> None:
    """What a checkout has, as far as commands touch it."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("scripts", "configs", "launch"):
        shutil.copytree(ROOT / name, template / name, ignore=ignored)
    (template / "docs/images").mkdir(parents=True)
    # The documents too: a traceback of their Python shows its lines.
    for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        shutil.copy(file, template / file.relative_to(ROOT))
    for name in ("Makefile", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, template)
    for config in (template / "configs").glob("*.py"):
        config.write_text(config.read_text(encoding="utf-8") + CUT_DOWN, encoding="utf-8")
    write_python(template / "bin")
    write_python(template / ".venv/bin")
    (template / ".venv/installed").touch()


def write_python(folder: Path) -> Path:
    """Makes this Python the one that `python` starts."""
    folder.mkdir(parents=True)
    python = folder / "python"
    # No symbolic link: an environment's Python looks for its packages beside its own name.
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def _write_texts(template: Path) -> None:
    shakespeare = _shared("data/tinyshakespeare.txt")
    if shakespeare is not None:
        text = shakespeare.read_text(encoding="utf-8")
    else:
        text = "".join(topics.values())[:300_000]
    (template / "tinyshakespeare.txt").write_text(text, encoding="utf-8")
    (template / "data").mkdir()
    (template / "data/shakespeare.txt").write_text(text, encoding="utf-8")
    short = text[:20_000]
    for name in FILES_OF_TEXT:
        (template / name).write_text(short, encoding="utf-8")
    (template / "story.txt").write_text("Once upon a time there was a king,\n")
    for name in FOLDERS_OF_TEXT:
        (template / name).mkdir()
        (template / name / "text.txt").write_text(short, encoding="utf-8")
    endings = ["barks.", "reads a book.", "sings.", "is far away."]
    item = {"activity_label": "Dogs", "ctx_a": "There is a dog.", "ctx_b": "It", "endings": endings}
    item |= {"ctx": "There is a dog. It", "label": 0}
    lines = "".join(json.dumps(item | {"ind": number}) + "\n" for number in range(4))
    (template / "items.jsonl").write_text(lines)


def _write_models(template: Path) -> None:
    key = jax.random.key(0)
    export_model(template / "path/to/huggingface_directory", init_params(MODEL, key), MODEL)
    sorter = _shared("fixtures/nano-sort")
    if sorter is not None:
        shutil.copytree(sorter, template / "nano-sort", copy_function=shutil.copyfile)
    else:
        export_model(template / "nano-sort", init_params(SORTER, key), SORTER)
    settings = LoraSettings(rank=2, alpha=2.0)
    for name in ADAPTERS:
        (template / name).parent.mkdir(parents=True, exist_ok=True)
        save_adapter(template / name, init_lora(MODEL, settings, key), settings, MODEL)


def _write_environment(template: Path, folder: Path, port: int) -> None:
    """The environment of the commands, kept as a file beside the template."""
    hidden = ("HF_", "HUGGING", "GPT2_JAX_", "JAX_", "XLA_", "GLIBC_", "PYTEST_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith(hidden)
    }
    programs = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
    environment = kept | {
        "PATH": f"{template / 'bin'}:{Path(sys.executable).parent}:{kept['PATH']}",
        "HOME": str(folder / "home"),
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if environment.pop("PYTHONDONTWRITEBYTECODE", None):
        # Written elsewhere instead: to compile all modules anew for each command takes longest.
        environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    (folder / "home").mkdir()
    (folder / "environment.json").write_text(json.dumps(environment))


def _train_once(template: Path) -> None:
    """A run and a data set, for the documents whose readers have some."""
    for command in (
        "python scripts/prepare_custom_text.py --input tinyshakespeare.txt "
        "--output ready/data/shakespeare",
        "python scripts/train.py --config configs/demo.py --run_dir ready/run",
    ):
        code, output = execute(command, template)
        if code:
            raise RuntimeError(f"{command}: exit status {code}\n{output}")


def copy(template: Path, place: Path, given: list[str]) -> Path:
    """The directory of a document, with the runs and data that its readers have."""
    shutil.copytree(template, place, ignore=shutil.ignore_patterns("ready"))
    for name in given:
        source = "run" if name.startswith("runs/") else name
        shutil.copytree(template / "ready" / source, place / name)
    return place


def execute(command: str, place: Path, typed: str = "") -> tuple[int, str]:
    """Runs a command as bash does, and returns its status with all that it printed."""
    environment = json.loads((place.parent / "environment.json").read_text())
    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=place,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(typed, timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return TOO_LONG, process.communicate()[0]
        return process.returncode, output
