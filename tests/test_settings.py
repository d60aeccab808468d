"""A run's settings: mistakes in them are told by name, before anything is done."""

import dataclasses
import math
from pathlib import Path

import pytest

from gpt2_jax.errors import UserError
from gpt2_jax.training.settings import (
    DataSettings,
    HellaSwagSettings,
    MeshSettings,
    OptimizerSettings,
    SampleSettings,
    TrainSettings,
    ValidationSettings,
)


def settings(**fields):
    return TrainSettings(**{"run_dir": "runs/test", "steps": 3, **fields})


@pytest.mark.parametrize("steps", [0, -1, 2.5, "3", None])
def test_steps_must_be_a_whole_number(steps):
    with pytest.raises(UserError, match=r"^steps=.* must be a whole number of at least 1"):
        settings(steps=steps)


@pytest.mark.parametrize("name", ["sequence_length", "batch_size", "micro_batch_size"])
def test_sizes_of_data_must_be_positive(name):
    with pytest.raises(UserError, match=f"^data.{name}=0 "):
        settings(data=DataSettings(**{name: 0}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": DataSettings(batch_size=10, micro_batch_size=4)}, "is not a multiple of"),
        ({"data": DataSettings(batch_size=4, micro_batch_size=8)}, "is not a multiple of"),
        ({"data": DataSettings(sequence_length=1025)}, "more than model.n_positions=1024"),
        ({"validation": ValidationSettings(every=0)}, "^validation.every=0 "),
        ({"validation": ValidationSettings(windows=0)}, "^validation.windows=0 "),
        ({"checkpoint_every": 0}, "^checkpoint_every=0 "),
        ({"log_every": 0}, "^log_every=0 "),
        ({"keep_checkpoints": 0}, "^keep_checkpoints=0 "),
        ({"samples": SampleSettings(every=-1)}, "^samples.every=-1 "),
        ({"samples": SampleSettings(count=0)}, "^samples.count=0 "),
        ({"hellaswag": HellaSwagSettings(every=-1)}, "^hellaswag.every=-1 "),
        ({"hellaswag": HellaSwagSettings(items=0)}, "^hellaswag.items=0 "),
        ({"validation": ValidationSettings(reference_loss=0)}, "^validation.reference_loss=0 "),
        ({"validation": ValidationSettings(reference_loss=math.nan)}, "reference_loss=nan "),
        ({"remat": "all"}, "^remat='all' must be none or dots or block"),
        ({"init_from": ""}, "^init_from='' "),
        ({"wandb": ""}, "^wandb='' "),
        ({"wandb": True}, "^wandb=True "),
        ({"dtype": "float16"}, "^dtype='float16' "),
        ({"seed": -1}, "^seed=-1 "),
        ({"seed": 2**31}, "^seed=2147483648 "),
    ],
)
def test_values_out_of_range_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        settings(**fields)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("learning_rate", -1e-4),
        ("learning_rate", math.nan),
        ("final_learning_rate", math.inf),
        ("weight_decay", -0.1),
        ("epsilon", 0.0),
        ("clip_norm", 0.0),
        ("clip_norm", math.inf),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("beta2", math.nan),
        ("warmup_steps", -1),
        ("max_skipped_steps", 0),
        ("learning_rate", True),
        ("learning_rate", "3e-4"),
    ],
)
def test_bad_optimizer_values_are_named(name, bad):
    with pytest.raises(UserError, match=rf"^optimizer\.{name}="):
        settings(optimizer=OptimizerSettings(**{name: bad}))


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": OptimizerSettings(warmup_steps=1.5)},
        {"optimizer": OptimizerSettings(warmup_steps=math.nan)},
        {"seed": 1.5},
    ],
    ids=["half a step", "nan steps", "half a seed"],
)
def test_counts_and_seeds_must_be_whole(fields):
    with pytest.raises(UserError):
        settings(**fields)


def test_settings_cannot_change_during_a_run():
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings().steps = 5


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
@pytest.mark.parametrize("size", [0, -2, 1.0, True, "2", None])
def test_sizes_of_the_mesh_are_whole_numbers(axis, size):
    with pytest.raises(UserError, match=rf"^mesh\.{axis}=.* at least 1, or -1"):
        settings(mesh=MeshSettings(**{axis: size}))


def test_one_axis_of_the_mesh_fills():
    assert settings(mesh=MeshSettings(1, 1, -1)).mesh.tensor == -1
    for sizes in [(-1, -1, 1), (-1, 1, -1), (1, -1, -1), (-1, -1, -1)]:
        with pytest.raises(UserError, match="only one axis"):
            settings(mesh=MeshSettings(*sizes))


@pytest.mark.parametrize(
    "name", ["run_dir", "data.path", "hellaswag.path", "samples.prompt", "init_from", "wandb"]
)
def test_paths_are_text_so_that_they_can_be_stored(name):
    """A Path in a config file is an easy mistake; config.json could not hold it."""
    section, _, field = name.rpartition(".")
    kinds = {"data": DataSettings, "hellaswag": HellaSwagSettings, "samples": SampleSettings}
    fields = {section: kinds[section](**{field: Path("a")})} if section else {name: Path("a")}
    with pytest.raises(UserError, match=rf"^{name}="):
        settings(**fields)


def test_an_empty_run_directory_is_refused():
    """Of --run_dir "$NOT_SET" the working directory must not become a run."""
    with pytest.raises(UserError, match=r"^run_dir="):
        settings(run_dir="")
