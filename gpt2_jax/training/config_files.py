"""Settings as files: the Python configs people write, and the JSON a run keeps.

A config in `configs/` is trusted code, run once when a training starts. What a run stores is
data: reading it runs nothing.
"""

import dataclasses
import difflib
import json
import re
import runpy
import traceback
from pathlib import Path
from typing import Any

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.files import read_text
from gpt2_jax.lora_settings import LoraSettings
from gpt2_jax.training.settings import (
    DataSettings,
    HellaSwagSettings,
    MeshSettings,
    OptimizerSettings,
    SampleSettings,
    TrainSettings,
    ValidationSettings,
)

# May change when a run is resumed: they move the run or its records, not what it computes
# beyond the rounding of sums in another order and, with dropout, the draw of its masks.
FREE_ON_RESUME = (
    "run_dir",
    "data.path",
    "data.micro_batch_size",
    "mesh",
    "validation.patience",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "tensorboard",
    "wandb",
    "remat",
    "loss_chunk",
)


def load_config_file(path: Path) -> TrainSettings:
    """Runs a Python config file and returns its `config`; or reads the config.json of a run.

    Raises:
      UserError: if the file does not exist, fails, or defines no `config`; a misspelt field is
        named together with the nearest known one.
    """
    if not path.is_file():
        raise UserError(f"config file {path} does not exist; the ready ones are in configs/")
    if path.suffix == ".json":
        return from_json(read_text(path), str(path))
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError as error:
        raise UserError(f"config file {path}: {error}") from None
    except Exception as error:
        raise UserError(f"config file {path}, {_where(error, path)}: {_reason(error)}") from None
    if not isinstance(config, TrainSettings):
        raise UserError(f"config file {path} must define config = TrainSettings(...)")
    return config


def to_json(settings: TrainSettings) -> str:
    """The settings as JSON text, nested as the dataclasses are."""
    return json.dumps(dataclasses.asdict(settings), indent=2) + "\n"


def from_json(text: str, source: str) -> TrainSettings:
    """Reads back what `to_json` wrote.

    Args:
      text: the JSON.
      source: where it came from, for the error message.

    Raises:
      UserError: if it is not JSON, has an unknown field or lacks one without a default.
    """
    try:
        fields: dict[str, Any] = json.loads(text)
        for name, kind in _SECTIONS.items():
            fields[name] = kind(**fields.get(name, {}))
        if fields.get("lora") is not None:
            fields["lora"] = LoraSettings(**_with_tuples(fields["lora"]))
        return TrainSettings(**fields)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{source} is not the config of a run ({error})") from None


def differences(stored: TrainSettings, wanted: TrainSettings) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, by dotted name: (stored, wanted)."""
    before, after = _flatten(dataclasses.asdict(stored)), _flatten(dataclasses.asdict(wanted))
    names = dict.fromkeys([*before, *after])
    pairs = {name: (before.get(name), after.get(name)) for name in names}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def is_free_on_resume(name: str, settings: TrainSettings) -> bool:
    """Whether a setting may change when a run with the new settings goes on."""
    if name == "init_from" and settings.lora is not None:
        return True  # the weights themselves are compared, wherever they lie now
    return any(name == free or name.startswith(f"{free}.") for free in FREE_ON_RESUME)


_SECTIONS: dict[str, type] = {
    "model": GPT2Config,
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "mesh": MeshSettings,
    "validation": ValidationSettings,
    "samples": SampleSettings,
    "hellaswag": HellaSwagSettings,
}


def _with_tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    if isinstance(value, list):
        return tuple(_with_tuples(item) for item in value)
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return value


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        below = _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat.update({prefix + name: value} if below is None else below)
    return flat


def _reason(error: Exception) -> str:
    """The error's text; for a misspelt field, with the nearest one there is."""
    kinds = (TrainSettings, LoraSettings, *_SECTIONS.values())
    names = "|".join(kind.__name__ for kind in kinds)
    misspelt = re.search(rf"(?:{names})\.__init__.* keyword argument '(\w+)'", str(error))
    if not misspelt:
        return str(error)
    known = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    near = difflib.get_close_matches(misspelt[1], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "--help lists every setting"
    return f"unknown setting {misspelt[1]!r}; {hint}"


def _where(error: Exception, path: Path) -> str:
    """The line of the config file an error came from."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"line {lines[-1]}, {type(error).__name__}" if lines else type(error).__name__
