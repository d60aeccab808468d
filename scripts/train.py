"""Trains a GPT-2: python scripts/train.py --config configs/demo.py.

The same command goes on with a run that was stopped, and starts each process of a run on many
hosts.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from gpt2_jax.allocator import restart_keeping_memory
from gpt2_jax.cli import keep_compiled_programs, parse_flags_over_config, run
from gpt2_jax.training.config_files import load_config_file
from gpt2_jax.training.settings import DistributedSettings, TrainSettings


@dataclasses.dataclass(frozen=True)
class Flags:
    """Trains a GPT-2 as a config says; every setting of the config is also a flag."""

    config: Path
    """file with the settings, one of configs/*.py or your own"""
    settings: Annotated[TrainSettings, tyro.conf.arg(name="")]
    resume: bool = False
    """insist on a run to go on with; without it too, a run with the same settings is resumed"""
    allow_changes: bool = False
    """go on with the run in run_dir even though settings or data have changed"""
    overwrite: bool = False
    """replace the run that is already in run_dir"""
    profile: bool = False
    """write a JAX trace of three steps to run_dir/profile"""
    distributed: DistributedSettings = DistributedSettings()
    """processes on several hosts"""


def main() -> None:
    """Joins the other processes, if there are any, and trains."""
    flags = parse_flags_over_config(Flags, load_config_file)
    settings = flags.settings

    # Only now the slow imports, so that --help and mistakes answer at once.
    from gpt2_jax import experiment
    from gpt2_jax.training.distributed import is_primary, join_cluster

    join_cluster(flags.distributed)
    keep_compiled_programs()
    state = experiment.run(
        settings,
        resume=flags.resume,
        overwrite=flags.overwrite,
        allow_changes=flags.allow_changes,
        profile=flags.profile,
    )
    if int(state.step) == settings.steps and is_primary():
        print(
            f"finished: {settings.run_dir}/ holds config.json, metrics.jsonl, loss.png, "
            f"checkpoints/"
        )


if __name__ == "__main__":
    restart_keeping_memory()
    run(main)
