"""Scores a GPT-2 on HellaSwag: python scripts/eval_hellaswag.py --source gpt2 --limit 1000."""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gpt2_jax.cli import (
    check_writable_place,
    given_flags,
    keep_compiled_programs,
    parse_flags,
    run,
)
from gpt2_jax.config import check_positive_int
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.hellaswag_items import (
    FIELDS,
    PROTOCOLS,
    VALIDATION_FILE,
    VALIDATION_URL,
    Item,
    Protocol,
    read_items,
    validation_file,
)
from gpt2_jax.files import write_text
from gpt2_jax.model_flags import Evaluated, ModelFlags, explained_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpt2_jax.evaluation.hellaswag import HellaSwagResult
    from gpt2_jax.evaluation.progress import ScoringProgress

# What other batches and devices may change of an ending's loss, nats; see docs/evaluate.md.
TIE = {"float32": 1e-3, "bfloat16": 0.5}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Counts how often a model finds the true one of four endings likeliest; chance is 0.25.

    Two protocols are in use, whose numbers differ by more than a point: karpathy/build-nanogpt's
    and lm-evaluation-harness's. Both are told, each by its name.
    """

    evaluated: Annotated[ModelFlags, tyro.conf.arg(name="")] = ModelFlags()
    """the model"""
    data: Path | None = None
    """items as .jsonl or .jsonl.gz; None is the validation set in data/hellaswag_val.jsonl, which
    is downloaded if it is not there"""
    url: str = VALIDATION_URL
    """where the validation set is downloaded from"""
    protocols: tuple[Protocol, ...] = PROTOCOLS
    """whose numbers to make"""
    limit: int | None = None
    """score the first items only; None is all of them, 10,042 in the validation set"""
    output: Path | None = None
    """also write scores, predictions and settings to this JSON file"""


def main() -> None:
    """Checks the flags, reads the items, loads the model, prints its scores."""
    flags = parse_flags(Flags)
    _check(flags, given_flags())
    data = flags.data
    if data is None:
        data = validation_file(url=flags.url, tell=lambda line: print(line, file=sys.stderr))
    protocols = list(dict.fromkeys(flags.protocols))
    fields = {field for protocol in protocols for field in FIELDS[protocol]}
    items = read_items(data, flags.limit, fields=fields)

    # Only now the slow imports, so that --help and mistakes answer at once.
    keep_compiled_programs()
    layout = flags.evaluated.layout()
    evaluated = flags.evaluated.load(layout)
    evaluate = {protocol: _prepare(protocol, items, evaluated) for protocol in protocols}
    print(f"scoring {len(items):,} items on {layout.mesh.size} device(s) ...", file=sys.stderr)
    sys.stdout.reconfigure(errors="replace")  # letters of names that the terminal lacks
    scored = {}
    for protocol in protocols:
        with explained_memory(layout):
            scored[protocol] = _score(protocol, evaluate[protocol])
        if len(scored) == 1:
            _print_head(flags, data, len(items))
        _print(*scored[protocol], TIE[flags.evaluated.dtype])
    if flags.output is not None:
        facts = {"benchmark": "hellaswag", "items": len(items), "data": str(data)}
        facts |= {"limit": flags.limit, **flags.evaluated.facts(layout)}
        write_text(flags.output, _to_json(facts, items, scored, TIE[flags.evaluated.dtype]))
        print(f"wrote {flags.output}", file=sys.stderr)


def _check(flags: Flags, given: set[str]) -> None:
    flags.evaluated.check()
    if flags.limit is not None:
        check_positive_int("limit", flags.limit)
    if not flags.protocols:
        raise UserError(f"--protocols is empty; give {' or '.join(PROTOCOLS)}, or leave it out")
    if "url" in given and flags.data is not None:
        raise UserError(f"--url {flags.url} is for the validation set; drop it, or --data")
    if flags.output is not None:
        read = [VALIDATION_FILE if flags.data is None else flags.data]
        check_writable_place(flags.output, read=read)


def _prepare(
    protocol: Protocol, items: list[Item], evaluated: Evaluated
) -> "Callable[[ScoringProgress], HellaSwagResult]":
    from gpt2_jax.evaluation.hellaswag import make_hellaswag
    from gpt2_jax.generation.text_stream import speaks_gpt2

    model, params, layout = evaluated
    if not speaks_gpt2(model.config):
        raise UserError(
            f"vocab_size={model.config.vocab_size} is not that of GPT-2's tokenizer, with which "
            f"texts become tokens; give a model that has it"
        )
    evaluate = make_hellaswag(
        model, items, layout.rows, layout.put_rows, layout.replicated, protocol=protocol
    )
    return functools.partial(evaluate, params)


def _score(
    protocol: Protocol, evaluate: "Callable[[ScoringProgress], HellaSwagResult]"
) -> "tuple[HellaSwagResult, float]":
    """Also the seconds that scoring took, compilation included."""
    import numpy as np

    from gpt2_jax.evaluation.progress import ScoringProgress

    start = time.perf_counter()
    with ScoringProgress(protocol) as progress:
        result = evaluate(progress)
    if not np.isfinite(result.sums_NE).all():
        raise UserError("the model's losses are not finite; its weights are broken, give others")
    return result, time.perf_counter() - start


def _print_head(flags: Flags, data: Path, items: int) -> None:
    print(f"HellaSwag, {items:,} items of {data}")
    print(f"source    {flags.evaluated.name}")
    if flags.evaluated.lora is not None:
        print(f"lora      {flags.evaluated.lora}")


def _print(result: "HellaSwagResult", seconds: float, tie: float) -> None:
    score = result.score
    print(f"\nprotocol of {result.protocol}")
    print(f"acc       {score.acc:.4f} +- {score.acc_stderr:.4f}")
    print(f"acc_norm  {score.acc_norm:.4f} +- {score.acc_norm_stderr:.4f}")
    print(f"ties      {result.ties(tie):,} items, which {tie:g} nats would decide")
    if result.cut_N.any():
        print(f"cut       {result.cut_N.sum():,} items, longer than the model's context")
    print(f"seconds   {seconds:.1f}", flush=True)


def _to_json(
    facts: dict[str, Any],
    items: list[Item],
    scored: "dict[Protocol, tuple[HellaSwagResult, float]]",
    tie: float,
) -> str:
    """What --output holds: an object, in which every item's predictions have a line."""
    summary = {}
    for protocol, (result, seconds) in scored.items():
        score = result.score
        summary[protocol] = {
            "acc": score.acc,
            "acc_stderr": score.acc_stderr,
            "acc_norm": score.acc_norm,
            "acc_norm_stderr": score.acc_norm_stderr,
            "ties": result.ties(tie),
            "tie_nats": tie,
            "cut": int(result.cut_N.sum()),
            "seconds": round(seconds, 3),
        }
    predictions = [
        {
            "item": number,
            "ind": item.ind,
            "label": item.label,
            **{name: result.prediction(number) for name, (result, _) in scored.items()},
        }
        for number, item in enumerate(items)
    ]
    text = json.dumps({**facts, "protocols": summary, "predictions": None}, indent=2)
    lines = ",\n".join("    " + json.dumps(prediction) for prediction in predictions)
    return text.replace('"predictions": null', f'"predictions": [\n{lines}\n  ]') + "\n"


if __name__ == "__main__":
    run(main)
