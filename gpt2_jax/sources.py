"""Opens a model wherever it is: pretrained weights, a training run, a Hugging Face directory.

An adapter can be merged into any of them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gpt2_jax.config import SIZES, GPT2Config, config_for_size
from gpt2_jax.errors import UserError
from gpt2_jax.interop.peft import fit_adapter, read_adapter
from gpt2_jax.interop.pretrained import load_pretrained
from gpt2_jax.lora import Lora, merge
from gpt2_jax.lora_settings import LoraSettings
from gpt2_jax.model import Params, param_shapes

PRETRAINED = "pretrained"


def load_source(
    source: str,
    *,
    model: str | None = None,
    weights: str | None = None,
    revision: str | None = None,
    lora: str | None = None,
) -> tuple[Params, GPT2Config]:
    """Loads parameters and configuration as scripts name them.

    Args:
      source: "pretrained", a size by its name (the same with `model`), a run directory of
        `scripts/train.py`, or a Hugging Face directory.
      model: with "pretrained", the size; without `weights` its default is "gpt2".
      weights: with "pretrained", a local file or directory to read instead of the hub.
      revision: with "pretrained", branch, tag or commit on the hub.
      lora: directory of an adapter in PEFT's format, to be merged into the parameters.

    Raises:
      UserError: if the source or the adapter does not exist or does not hold what it should, or
        the adapter does not fit.
    """
    if lora is not None:
        params, config, [adapter] = load_with_adapters(
            source, [Path(lora)], model=model, weights=weights, revision=revision
        )
        return merge(params, *adapter), config
    place = find_source(source, model=model, weights=weights, revision=revision)
    if place.is_run:
        return _load_run(Path(place.name))
    return load_pretrained(place.name, config=place.config, revision=revision)


def load_with_adapters(
    source: str,
    directories: Sequence[Path],
    *,
    model: str | None = None,
    weights: str | None = None,
    revision: str | None = None,
) -> tuple[Params, GPT2Config, list[tuple[Lora, LoraSettings]]]:
    """Loads a base, its configuration, and adapters that fit it, each by itself.

    Arguments and errors are those of `load_source`; `directories` are the adapters'.
    """
    # The adapters are read first: the base can be long in coming.
    files = [read_adapter(directory) for directory in directories]
    params, config = load_source(source, model=model, weights=weights, revision=revision)
    return params, config, [fit_adapter(adapter, config) for adapter in files]


class Place(NamedTuple):
    """Where a model is."""

    name: str | Path
    """a run directory, or what `load_pretrained` takes"""
    is_run: bool = False
    """whether it is a run directory"""
    config: GPT2Config | None = None
    """the size that was asked for"""


def find_source(
    source: str,
    *,
    model: str | None = None,
    weights: str | None = None,
    revision: str | None = None,
) -> Place:
    """Where the model is that `load_source` loads for these arguments; nothing is read yet.

    Raises:
      UserError: if the arguments don't go together, or the source is no directory.
    """
    if source in SIZES and model is None:
        source, model = PRETRAINED, source
    if source == PRETRAINED:
        config = config_for_size(model) if model is not None else None
        if weights is None:
            return Place(model or "gpt2")
        return Place(Path(weights), config=config)
    for name, value in (("model", model), ("weights", weights), ("revision", revision)):
        if value is not None:
            raise UserError(f"--{name} {value} goes with --source pretrained, not with {source}")
    directory = Path(source)
    if not directory.is_dir():
        raise UserError(
            f"source {source!r} is no directory; give pretrained, {', '.join(SIZES)}, "
            f"a run directory or a Hugging Face directory"
        )
    return Place(directory, is_run=_is_run(directory))


def _is_run(directory: Path) -> bool:
    """Whether config.json is that of a training run, with the architecture under "model"."""
    try:
        return "model" in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _load_run(run_dir: Path) -> tuple[Params, GPT2Config]:
    from gpt2_jax.training.checkpoint import Checkpoints
    from gpt2_jax.training.config_files import from_json

    file = run_dir / "config.json"
    settings = from_json(file.read_text(encoding="utf-8"), str(file))
    if settings.lora is not None:
        raise UserError(
            f"{run_dir} trained an adapter; give its base, {settings.init_from}, and "
            f"--lora {run_dir / 'adapter'}"
        )
    config = settings.model
    if not (run_dir / "checkpoints").is_dir():
        raise UserError(f"{run_dir} has no checkpoints yet; train the run until it saves one")
    return Checkpoints(run_dir).restore_params(param_shapes(config)), config
