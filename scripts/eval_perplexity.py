"""Perplexity of a GPT-2 on texts: python scripts/eval_perplexity.py --source gpt2 --text FILE."""

import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gpt2_jax.cli import (
    check_given_once,
    check_writable_place,
    given_flags,
    keep_compiled_programs,
    parse_flags,
    run,
)
from gpt2_jax.config import GPT2Config, check_positive_int
from gpt2_jax.errors import UserError
from gpt2_jax.files import read_text, write_text
from gpt2_jax.generation.text_stream import speaks_gpt2
from gpt2_jax.model_flags import ModelFlags, explained_memory
from gpt2_jax.tokenizer import END_OF_TEXT_ID, VOCAB_SIZE, encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np

    from gpt2_jax.evaluation.perplexity import Document, Figures, Protocol
    from gpt2_jax.model_flags import Evaluated

TITLES = {
    "strided": "strided windows as in Hugging Face's documentation",
    "rolling": "rolling windows as in lm-evaluation-harness",
}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measures how well a model predicts texts: perplexity of a token and of a byte, bits/byte.

    Figures are for each document and for all together. A text file is one document; data are cut
    where <|endoftext|> stands, which is never predicted itself.
    """

    evaluated: Annotated[ModelFlags, tyro.conf.arg(name="")] = ModelFlags()
    """the model"""
    text: tuple[Path, ...] = ()
    """UTF-8 files to score, each one document"""
    data: Path | None = None
    """score a split of this directory of token shards instead, ours, nanoGPT's or llm.c's"""
    split: Literal["train", "val"] = "val"
    """of --data"""
    limit: int | None = None
    """score the first documents only; None is all of them"""
    protocol: Literal["strided", "rolling"] = "strided"
    """windows as Hugging Face's documentation lays them, or as lm-evaluation-harness does, with
    <|endoftext|> before each document"""
    context: int | None = None
    """longest window, in tokens; None is the model's context"""
    stride: int | None = None
    """tokens from one strided window to the next: fewer leave more context and take longer; None
    is half of the context"""
    documents: int = 20
    """rows of the table; what documents are left share one more"""
    output: Path | None = None
    """also write every document's figures, and what they are of, to this JSON file"""


def main() -> None:
    """Checks the flags, reads the texts, loads the model, prints its figures."""
    flags = parse_flags(Flags)
    _check(flags, given_flags())

    # Only now the slow imports, so that --help and mistakes answer at once.
    if flags.context is not None:
        _protocol(flags, flags.context).check()
    streams = _read(flags)
    keep_compiled_programs()
    layout = flags.evaluated.layout()
    protocol, figures, seconds = _score(flags, streams, flags.evaluated.load(layout))
    _print(flags, protocol, figures, seconds)
    if flags.output is not None:
        facts = _facts(flags, protocol, figures, seconds) | flags.evaluated.facts(layout)
        write_text(flags.output, json.dumps(facts, indent=2) + "\n")
        print(f"wrote {flags.output}", file=sys.stderr)


def _check(flags: Flags, given: set[str]) -> None:
    flags.evaluated.check()
    for name in ("limit", "stride", "context"):
        if getattr(flags, name) is not None:
            check_positive_int(name, getattr(flags, name))
    if flags.documents < 0:
        raise UserError(f"documents={flags.documents} must be a whole number of at least 0")
    if bool(flags.text) == (flags.data is not None):
        raise UserError("the text must come from one place; give either --text FILE or --data DIR")
    check_given_once("text", flags.text)
    if flags.data is not None and not flags.data.is_dir():
        raise UserError(f"--data {flags.data} is no directory of shards; texts go with --text")
    if "split" in given and flags.data is None:
        raise UserError(f"--split {flags.split} goes with --data DIR; drop it")
    if flags.stride is not None and flags.protocol == "rolling":
        raise UserError(f"--stride {flags.stride} goes with --protocol strided; drop it")
    if flags.output is not None:
        check_writable_place(flags.output, read=flags.text)


def _protocol(flags: Flags, context: int) -> "Protocol":
    from gpt2_jax.evaluation.perplexity import Protocol

    if flags.protocol == "rolling":
        return Protocol("rolling", context)
    return Protocol("strided", context, context // 2 if flags.stride is None else flags.stride)


def _read(flags: Flags) -> "Sequence[np.ndarray]":
    """Token ids of each text, or of each shard."""
    from gpt2_jax.data.shards import read_shards

    if flags.data is None:
        return [encode(read_text(file)) for file in flags.text[: flags.limit]]
    # The model's own vocabulary is not known yet.
    return read_shards(flags.data, flags.split, vocab_size=1 << 16)


def _score(
    flags: Flags, streams: "Sequence[np.ndarray]", evaluated: "Evaluated"
) -> "tuple[Protocol, list[Figures], float]":
    """Also the seconds that scoring took, compilation included."""
    from gpt2_jax.evaluation.continuations import make_scorer
    from gpt2_jax.evaluation.perplexity import byte_lengths, check_documents, score_documents
    from gpt2_jax.evaluation.progress import ScoringProgress

    model, params, layout = evaluated
    protocol = _protocol(flags, flags.context or model.config.n_positions)
    protocol.check(model.config.n_positions)
    documents = _documents(flags, streams, model.config)
    check_documents(documents, protocol, model.config)
    scorer = make_scorer(model, layout.rows, layout.put_rows, layout.replicated)
    lengths = byte_lengths() if speaks_gpt2(model.config) else None
    devices = layout.mesh.size
    print(f"scoring {len(documents):,} document(s) on {devices} device(s) ...", file=sys.stderr)
    start = time.perf_counter()
    with explained_memory(layout), ScoringProgress("perplexity") as progress:
        figures = score_documents(scorer, params, documents, protocol, lengths, progress)
    if not all(math.isfinite(one.nll) for one in figures):
        raise UserError("the model's losses are not finite; its weights are broken, give others")
    return protocol, figures, time.perf_counter() - start


def _documents(
    flags: Flags, streams: "Iterable[np.ndarray]", config: GPT2Config
) -> "list[Document]":
    """What to score, each document with the token before it that is context alone."""
    from gpt2_jax.evaluation.perplexity import Document, beginning_with, cut_documents

    gpt2 = speaks_gpt2(config)
    if flags.data is None and not gpt2:
        raise UserError(
            f"vocab_size={config.vocab_size} is not that of GPT-2's tokenizer, {VOCAB_SIZE}, which "
            f"--text needs; give --data DIR with shards of the model's own tokens"
        )
    end_of_text = END_OF_TEXT_ID if gpt2 else config.eos_token_id
    if flags.data is None:
        names = map(str, flags.text)
    else:
        streams = itertools.islice(cut_documents(streams, end_of_text), flags.limit)
        names = map(str, itertools.count(1))
    if flags.protocol == "rolling":
        if end_of_text is None:
            raise UserError(
                "--protocol rolling sets the end-of-text token before each document, and this "
                "model has none (eos_token_id=None); use --protocol strided"
            )
        streams = (beginning_with(end_of_text, tokens) for tokens in streams)
    return [Document(name, tokens) for tokens, name in zip(streams, names, strict=False)]


def _print(flags: Flags, protocol: "Protocol", figures: "list[Figures]", seconds: float) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gpt2_jax.evaluation.perplexity import number_text, total

    sys.stdout.reconfigure(errors="replace")  # letters of names that the terminal lacks
    print(f"perplexity, {TITLES[protocol.name]}")
    print(f"source           {flags.evaluated.name}")
    if flags.evaluated.lora is not None:
        print(f"lora             {flags.evaluated.lora}")
    stride = "" if protocol.stride is None else f", stride {protocol.stride:,}"
    print(f"windows          {protocol.context:,} tokens{stride}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("document", overflow="fold")
    for column in ("tokens", "bytes", "loss", "perplexity", "byte\nperplexity", "bits/\nbyte"):
        table.add_column(column, justify="right", no_wrap=True)
    shown, others = figures[: flags.documents], figures[flags.documents :]
    for one in [*shown, total(f"{len(others):,} more", others)] if others else shown:
        table.add_row(Text(one.name), *map(number_text, one.values().values()))
    Console(width=None if sys.stdout.isatty() else 80).print(table)
    for name, value in total("total", figures).values().items():
        print(f"{name.replace('_', ' '):17}{number_text(value)}")
    print(f"seconds          {seconds:.1f}")


def _facts(
    flags: Flags, protocol: "Protocol", figures: "list[Figures]", seconds: float
) -> dict[str, Any]:
    """What --output holds beside the model; null is what there is not, or is not finite."""
    from gpt2_jax.evaluation.perplexity import total

    def finite(one: "Figures") -> dict[str, float | None]:
        values = {"nll": one.nll, **one.values()}
        return {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}

    return {
        "benchmark": "perplexity",
        **finite(total("total", figures)),
        "documents": [{"name": one.name, **finite(one)} for one in figures],
        "seconds": round(seconds, 3),
        "text": list(map(str, flags.text)),
        "data": str(flags.data) if flags.data else None,
        "split": flags.split if flags.data else None,
        "limit": flags.limit,
        "protocol": protocol.name,
        "context": protocol.context,
        "stride": protocol.stride,
    }


if __name__ == "__main__":
    run(main)
