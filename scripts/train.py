"""Trains a GPT-2: python scripts/train.py --config configs/demo.py."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from gpt2_jax.cli import parse_flags, run
from gpt2_jax.errors import UserError
from gpt2_jax.training.settings import TrainSettings, load_config_file


@dataclasses.dataclass(frozen=True)
class Flags:
    """Trains a GPT-2 as a config says; every setting of the config is also a flag."""

    config: Path
    """file with the settings, one of configs/*.py or your own"""
    settings: Annotated[TrainSettings, tyro.conf.arg(name="")]
    overwrite: bool = False
    """replace the run that is already in run_dir"""


def main() -> None:
    """Reads flags and data, then trains."""
    flags = read_flags()
    settings = flags.settings

    # Only now the slow imports, so that --help and mistakes answer at once.
    from gpt2_jax.data.batches import training_batches, validation_windows
    from gpt2_jax.data.dataset import open_dataset
    from gpt2_jax.training.loop import train

    data = settings.data
    train_windows, validation = open_dataset(
        data.path, data.sequence_length, settings.model.vocab_size
    )
    batches = training_batches(train_windows, data.batch_size, settings.seed)
    validation_NT = validation_windows(validation, settings.validation.windows)
    train(settings, batches, validation_NT, overwrite=flags.overwrite)
    print(f"finished: {settings.run_dir}/ holds config.json, metrics.jsonl, loss.png, checkpoints/")


def read_flags() -> Flags:
    """The flags, with the values of the --config file as their defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", type=Path)
    try:
        config = first.parse_known_args()[0].config
    except argparse.ArgumentError as error:
        raise UserError(f"{error}, such as configs/demo.py") from None
    if config is not None:
        return parse_flags(Flags, default=Flags(config, load_config_file(config)))
    if {"-h", "--help"}.isdisjoint(sys.argv):
        raise UserError("--config is missing; give a file, such as --config configs/demo.py")
    return parse_flags(Flags)


if __name__ == "__main__":
    run(main)
