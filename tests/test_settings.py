"""A run's settings: they come back from JSON, and mistakes in them are told by name."""

import dataclasses
import math
from pathlib import Path

import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.training.settings import (
    DataSettings,
    OptimizerSettings,
    TrainSettings,
    ValidationSettings,
    from_json,
    load_config_file,
    to_json,
)

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
IMPORTS = "from gpt2_jax.training.settings import *\n"


def settings(**fields):
    return TrainSettings(**{"run_dir": "runs/test", "steps": 3, **fields})


def test_settings_come_back_from_json_as_they_were():
    unusual = settings(
        model=GPT2Config(n_inner=100, eos_token_id=None, tie_word_embeddings=False),
        data=DataSettings(path="pydoc_data.topics", batch_size=12, micro_batch_size=4),
        optimizer=OptimizerSettings(learning_rate=1 / 3, warmup_steps=0),
        validation=ValidationSettings(every=7),
        dtype="float32",
        seed=2**31 - 1,
    )
    assert from_json(to_json(unusual), "config.json") == unusual


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "list"),
        ("3", "int"),
        ("{}", "model"),
        (to_json(settings()).replace('"steps"', '"stepps"'), "stepps"),
        (to_json(settings()).replace('"n_layer"', '"layers"'), "layers"),
        (to_json(settings()).replace('"steps": 3,', ""), "steps"),
        (to_json(settings()).replace('"steps": 3,', '"steps": 0,'), "steps=0"),
    ],
    ids=["cut short", "list", "number", "empty", "renamed", "nested", "missing", "bad value"],
)
def test_json_that_is_no_run_is_refused_with_the_reason(text, reason):
    with pytest.raises(UserError, match=reason):
        from_json(text, "runs/a/config.json")


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


def load(tmp_path, text):
    file = tmp_path / "mine.py"
    file.write_text(text)
    return load_config_file(file)


def test_a_config_file_gives_its_config(tmp_path):
    text = IMPORTS + "config = TrainSettings(run_dir='runs/test', steps=3)\n"
    assert load(tmp_path, text) == settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("settings = 3\n", "must define config"),
        ("config = {'steps': 3}\n", "must define config"),
        ("x = 1\nconfig = (1,\n", r"mine\.py, line 2: "),
        ("x = 1\n\nconfig = nothing\n", r"mine\.py, line 3, NameError: .*nothing"),
        (IMPORTS + "config = TrainSettings(run_dir='a', steps=0)\n", r"mine\.py: steps=0"),
        (
            IMPORTS + "config = TrainSettings(run_dir='a', stepps=2)\n",
            "unknown setting 'stepps'; did you mean 'steps'",
        ),
        (
            IMPORTS + "\nx = OptimizerSettings(learnin_rate=2)\n",
            r"line 3, .*'learnin_rate'; did you mean 'learning_rate'",
        ),
        (IMPORTS + "x = DataSettings(qqqq=2)\n", "unknown setting 'qqqq'; --help lists"),
    ],
)
def test_a_mistake_in_a_config_file_is_told_with_its_place(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, text)
    assert "mine.py" in str(caught.value)


def test_a_config_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.py does not exist; .*configs/"):
        load_config_file(tmp_path / "nothing.py")
    with pytest.raises(UserError, match="does not exist"):
        load_config_file(tmp_path)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_ready_config_loads_and_comes_back_from_json(file):
    config = load_config_file(file)
    assert from_json(to_json(config), file.name) == config


def test_every_ready_config_has_its_own_run_directory():
    directories = [load_config_file(file).run_dir for file in CONFIGS]
    assert directories
    assert len(set(directories)) == len(directories)


def test_settings_cannot_change_during_a_run():
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings().steps = 5
