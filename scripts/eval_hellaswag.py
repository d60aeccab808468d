"""Scores a GPT-2 on HellaSwag: python scripts/eval_hellaswag.py --source gpt2 --limit 1000."""

import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gpt2_jax.cli import keep_compiled_programs, parse_flags, run
from gpt2_jax.config import check_positive_int
from gpt2_jax.errors import UserError
from gpt2_jax.files import write_text

if TYPE_CHECKING:
    from gpt2_jax.evaluation.hellaswag import HellaSwagScore, Item
    from gpt2_jax.training.mesh import Layout


@dataclasses.dataclass(frozen=True)
class Flags:
    """Counts how often a model finds the true one of four endings likeliest; chance is 0.25.

    The protocol is that of karpathy/build-nanogpt, whose numbers differ a little from those of
    lm-evaluation-harness. All devices share the work.
    """

    source: str = "pretrained"
    """pretrained, a size, a run directory of train.py, or a Hugging Face model directory"""
    model: str | None = None
    """pretrained size: gpt2 (the default), gpt2-medium, gpt2-large or gpt2-xl"""
    weights: str | None = None
    """pretrained weights from here, not the hub: a .pt or .safetensors file, or a directory"""
    revision: str | None = None
    """branch, tag or commit of the pretrained model on the hub"""
    lora: str | None = None
    """directory of a LoRA adapter, merged into the model: the adapted one is scored"""
    data: Path = Path("data/hellaswag_val.jsonl")
    """HellaSwag's items, .jsonl or .jsonl.gz, from github.com/rowanz/hellaswag"""
    limit: int | None = None
    """score the first items only; None is all of them, 10,042 in the validation set"""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """of the arithmetic; bfloat16 is faster on accelerators, float32 is exact"""
    batch_size: int = 32
    """texts in a forward pass of all devices, four to an item; the scores do not depend on it"""
    output: Path | None = None
    """also write the scores, and what they are of, to this JSON file"""


def main() -> None:
    """Checks the flags, reads the items, loads the model, prints its scores."""
    flags = parse_flags(Flags)
    _check(flags)

    # Only now the slow imports, so that --help and mistakes answer at once.
    from gpt2_jax.evaluation.hellaswag import read_items

    items = read_items(flags.data, flags.limit)
    keep_compiled_programs()
    result, seconds = _score(flags, items, _layout(flags.batch_size))
    _print(flags, result, seconds)
    if flags.output is not None:
        facts = _facts(flags, result, seconds)
        write_text(flags.output, json.dumps(facts, indent=2) + "\n")
        print(f"wrote {flags.output}", file=sys.stderr)


def _check(flags: Flags) -> None:
    check_positive_int("batch_size", flags.batch_size)
    if flags.limit is not None:
        check_positive_int("limit", flags.limit)
    # Told before minutes of work are lost.
    file = flags.output
    if file is not None and file.is_dir():
        raise UserError(f"cannot write {file}: it is a folder; give a file")
    if file is not None and not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
        raise UserError(f"cannot write {file}; give a file in a folder that can be written")


def _layout(batch_size: int) -> "Layout":
    """Splits the rows of a batch over all devices."""
    from gpt2_jax.training.mesh import Layout, make_mesh
    from gpt2_jax.training.settings import MeshSettings

    mesh = make_mesh(MeshSettings())
    if batch_size % mesh.size:
        raise UserError(
            f"batch_size={batch_size} must be a multiple of the {mesh.size} devices, which share "
            f"the rows; {-(-batch_size // mesh.size) * mesh.size} fits"
        )
    return Layout(mesh, rows=batch_size, passes=1)


def _score(flags: Flags, items: "list[Item]", layout: "Layout") -> "tuple[HellaSwagScore, float]":
    """Loads the model and scores it; also the seconds that scoring took, compilation included."""
    import jax

    from gpt2_jax.evaluation.hellaswag import make_hellaswag
    from gpt2_jax.model import GPT2
    from gpt2_jax.sources import load_source

    params, config = load_source(
        flags.source,
        model=flags.model,
        weights=flags.weights,
        revision=flags.revision,
        lora=flags.lora,
    )
    model = GPT2(config, dtype=flags.dtype)
    evaluate = make_hellaswag(model, items, layout.rows, layout.put_rows, layout.replicated)
    params = jax.device_put(params, layout.replicated)
    print(f"scoring {len(items):,} items on {layout.mesh.size} device(s) ...", file=sys.stderr)
    start = time.perf_counter()
    return evaluate(params), time.perf_counter() - start


def _print(flags: Flags, result: "HellaSwagScore", seconds: float) -> None:
    from gpt2_jax.evaluation.hellaswag import PROTOCOL

    print(f"HellaSwag, protocol of {PROTOCOL}")
    print(f"source    {_source(flags)}")
    if flags.lora is not None:
        print(f"lora      {flags.lora}")
    print(f"acc       {result.acc:.4f} +- {result.acc_stderr:.4f}")
    print(f"acc_norm  {result.acc_norm:.4f} +- {result.acc_norm_stderr:.4f}")
    print(f"items     {result.items:,}")
    print(f"seconds   {seconds:.1f}")


def _source(flags: Flags) -> str:
    """The model in a word or two."""
    if flags.source != "pretrained":
        return flags.source
    return " ".join(filter(None, (flags.model or "gpt2", flags.weights, flags.revision)))


def _facts(flags: Flags, result: "HellaSwagScore", seconds: float) -> dict[str, Any]:
    """What --output holds."""
    import jax

    from gpt2_jax.evaluation.hellaswag import PROTOCOL

    device = jax.devices()[0].device_kind
    return {
        "benchmark": "hellaswag",
        "protocol": PROTOCOL,
        "acc": result.acc,
        "acc_stderr": result.acc_stderr,
        "acc_norm": result.acc_norm,
        "acc_norm_stderr": result.acc_norm_stderr,
        "items": result.items,
        "seconds": round(seconds, 3),
        "source": flags.source,
        "model": flags.model,
        "weights": flags.weights,
        "revision": flags.revision,
        "lora": flags.lora,
        "data": str(flags.data),
        "dtype": flags.dtype,
        "batch_size": flags.batch_size,
        "devices": f"{jax.device_count()} x {device} ({jax.default_backend()})",
        "versions": _versions("gpt2-jax", "jax", "jaxlib", "flax", "tiktoken"),
    }


def _versions(*packages: str) -> dict[str, str | None]:
    """Versions of packages; None of one that is not installed, such as a bare checkout."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    run(main)
