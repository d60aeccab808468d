"""Writes a model for transformers: scripts/export_hf.py --source runs/demo --output demo."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from gpt2_jax.cli import parse_flags, run
from gpt2_jax.config import SIZES, GPT2Config
from gpt2_jax.interop.model_directory import check_output, own_fields


@dataclasses.dataclass(frozen=True)
class Flags:
    """Writes a model as a directory that transformers opens, and what reads the same files."""

    output: Path
    """directory to be made"""
    source: str = "pretrained"
    """pretrained, a size, a run directory of train.py, or a Hugging Face model directory"""
    model: str | None = None
    """pretrained size: gpt2 (the default), gpt2-medium, gpt2-large or gpt2-xl"""
    weights: str | None = None
    """pretrained weights from here, not the hub: a .pt or .safetensors file, or a directory"""
    revision: str | None = None
    """branch, tag or commit of the pretrained model on the hub"""
    lora: str | None = None
    """directory of a LoRA adapter, to be merged into the weights"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the weights in the file; bfloat16 is half as large and rounded"""
    overwrite: bool = False
    """replace the model that --output holds"""


def main() -> None:
    """Checks the flags, loads the model, writes it and says how to open it."""
    flags = parse_flags(Flags)
    source = _local_source(flags)
    places = [source, flags.lora and Path(flags.lora)]
    check_output(flags.output, flags.overwrite, [place for place in places if place])

    # Only now the slow imports, so that --help and mistakes answer at once.
    from gpt2_jax.interop.export import export_model
    from gpt2_jax.interop.tokenizer_files import tokenizer_files
    from gpt2_jax.sources import load_source

    params, config = load_source(
        flags.source,
        model=flags.model,
        weights=flags.weights,
        revision=flags.revision,
        lora=flags.lora,
    )
    fields, files = own_fields(source)
    tokenizer, why_none = tokenizer_files(config, source)
    export_model(
        flags.output,
        params,
        config,
        dtype=flags.dtype,
        files=files | tokenizer,
        fields=fields,
        overwrite=flags.overwrite,
    )
    _report(flags, config, why_none)


def _local_source(flags: Flags) -> Path | None:
    """The file or directory that the weights are read from, if it is not the hub's."""
    if flags.source not in ("pretrained", *SIZES):
        return Path(flags.source)
    return Path(flags.weights) if flags.weights is not None else None


def _report(flags: Flags, config: GPT2Config, why_no_tokenizer: str) -> None:
    print(f"wrote {flags.output}: {config.parameter_count:,} parameters, {flags.dtype}")
    for file in sorted(flags.output.iterdir()):
        print(f"  {file.stat().st_size:>13,}  {file.name}")
    print("open it with")
    print(f'  transformers.AutoModelForCausalLM.from_pretrained("{flags.output}")')
    if not why_no_tokenizer:
        print(f'  transformers.pipeline("text-generation", model="{flags.output}")')
    else:
        print(
            f"note: no tokenizer is written: {why_no_tokenizer}; the model takes and gives "
            f"token ids",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
