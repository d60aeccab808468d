"""Settings as files: they come back from JSON as they were, and mistakes in them are told."""

import dataclasses
import json
from pathlib import Path

import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.lora_settings import LoraSettings
from gpt2_jax.training.config_files import (
    differences,
    from_json,
    is_free_on_resume,
    load_config_file,
    to_json,
)
from gpt2_jax.training.settings import (
    DataSettings,
    HellaSwagSettings,
    MeshSettings,
    OptimizerSettings,
    SampleSettings,
    TrainSettings,
    ValidationSettings,
)

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
IMPORTS = "from gpt2_jax.training.settings import *\n"
SETTINGS = TrainSettings(run_dir="runs/test", steps=3)
# No value is the default: whatever the file forgets, the comparison notices.
UNUSUAL = TrainSettings(
    run_dir="runs/größe 1",
    steps=7,
    model=GPT2Config(n_inner=100, eos_token_id=None, tie_word_embeddings=False),
    data=DataSettings("pydoc_data.topics", sequence_length=17, batch_size=12, micro_batch_size=4),
    optimizer=OptimizerSettings(1 / 3, 1e-300, 0, 0.1, 0.2, 1e-7, 0.0, 0.5, 3),
    mesh=MeshSettings(data=2, fsdp=-1, tensor=3),
    validation=ValidationSettings(every=7, windows=3, patience=2, reference_loss=3.29),
    samples=SampleSettings(every=5, prompt='a "quoted"\nprompt', count=1, max_new_tokens=9),
    hellaswag=HellaSwagSettings(path="items.jsonl", every=11, items=12),
    init_from="gpt2",
    lora=LoraSettings(
        ("c_proj", "h_1.attn.c_attn"), 3, 0.5, True, (("c_proj", 2),), (("h_1", 7.5),), 0.25
    ),
    checkpoint_every=13,
    keep_checkpoints=14,
    log_every=15,
    tensorboard=True,
    wandb="project",
    dtype="float32",
    remat="block",
    loss_chunk=128,
    seed=2**31 - 1,
)


def test_settings_come_back_from_json_as_they_were():
    assert from_json(to_json(UNUSUAL), "config.json") == UNUSUAL
    for field in dataclasses.fields(TrainSettings):
        assert getattr(UNUSUAL, field.name) != field.default, f"{field.name} is not tested"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting"),
        ("{", "Expecting"),
        ("[]", "list"),
        ("3", "int"),
        ("null", "None"),
        ("{}", "run_dir.*steps"),
        (to_json(SETTINGS).replace('"steps"', '"stepps"'), "stepps"),
        (to_json(SETTINGS).replace('"n_layer"', '"layers"'), "layers"),
        (to_json(SETTINGS).replace('"steps": 3,', ""), "steps"),
        (to_json(SETTINGS).replace('"steps": 3,', '"steps": 0,'), "steps=0"),
        (to_json(SETTINGS).replace('"steps": 3,', '"steps": "3",'), "steps='3'"),
        (to_json(SETTINGS).replace('"learning_rate": 0.0006', '"learning_rate": NaN'), "=nan"),
        ('{"run_dir": "a", "steps": 3, "model": null}', "NoneType"),
        ('{"run_dir": "a", "steps": 3, "data": [1]}', "data|list"),
        ('{"run_dir": "a", "steps": 3, "optimizer": 3}', "int"),
    ],
    ids=[
        "nothing",
        "cut short",
        "list",
        "number",
        "null",
        "empty",
        "renamed",
        "nested",
        "missing",
        "bad value",
        "text for a number",
        "no number",
        "null section",
        "list section",
        "number section",
    ],
)
def test_json_that_is_no_run_is_refused_with_file_and_reason(text, reason):
    with pytest.raises(UserError, match=reason) as caught:
        from_json(text, "runs/a/config.json")
    assert str(caught.value).startswith("runs/a/config.json")


def test_settings_added_later_have_their_defaults_in_older_files():
    older = json.loads(to_json(SETTINGS))
    for name in ("mesh", "hellaswag", "remat", "loss_chunk"):
        del older[name]
    del older["optimizer"]["max_skipped_steps"]
    assert from_json(json.dumps(older), "config.json") == SETTINGS


def load(tmp_path, text, name="mine.py"):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return load_config_file(file)


def test_a_config_file_gives_its_config(tmp_path):
    text = IMPORTS + "config = TrainSettings(run_dir='runs/test', steps=3)\n"
    assert load(tmp_path, text) == SETTINGS


def test_the_config_of_a_run_is_a_config_file_too(tmp_path):
    assert load(tmp_path, to_json(UNUSUAL), "config.json") == UNUSUAL


def test_a_broken_config_of_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is not the config of a run"):
        load(tmp_path, to_json(UNUSUAL)[:-20], "config.json")
    (tmp_path / "config.json").write_bytes(b'{"run_dir": "\xff"}')
    with pytest.raises(UserError, match=r"config\.json is not UTF-8"):
        load_config_file(tmp_path / "config.json")


def test_a_stored_config_is_never_run(tmp_path):
    """JSON by its name is data, whatever it holds."""
    with pytest.raises(UserError, match="not the config of a run"):
        load(tmp_path, IMPORTS + "config = TrainSettings('runs/test', 3)\n", "config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must define config"),
        ("settings = 3\n", "must define config"),
        ("config = {'steps': 3}\n", "must define config"),
        (IMPORTS + "config = TrainSettings\n", "must define config"),
        ("x = 1\nconfig = (1,\n", r"mine\.py, line 2: "),
        ("x = 1\n\nconfig = nothing\n", r"mine\.py, line 3, NameError: .*nothing"),
        ("import nowhere.to.be.found\n", r"mine\.py, line 1, ModuleNotFoundError: .*nowhere"),
        (IMPORTS + "config = TrainSettings(run_dir='a', steps=0)\n", r"mine\.py: steps=0"),
        (IMPORTS + "config = TrainSettings(steps=2)\n", r"line 2, TypeError: .*'run_dir'"),
        (
            IMPORTS + "config = TrainSettings(run_dir='a', stepps=2)\n",
            "unknown setting 'stepps'; did you mean 'steps'",
        ),
        (
            IMPORTS + "\nx = OptimizerSettings(learnin_rate=2)\n",
            r"line 3, .*'learnin_rate'; did you mean 'learning_rate'",
        ),
        (IMPORTS + "x = MeshSettings(fdsp=2)\n", "'fdsp'; did you mean 'fsdp'"),
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


def test_differences_are_told_by_dotted_name_with_both_values():
    assert differences(SETTINGS, SETTINGS) == {}
    changed = dataclasses.replace(
        SETTINGS,
        steps=4,
        model=GPT2Config(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, n_inner=64),
        optimizer=OptimizerSettings(beta2=0.99),
        wandb="gpt2",
    )
    assert differences(SETTINGS, changed) == {
        "steps": (3, 4),
        "model.n_inner": (None, 64),
        "optimizer.beta2": (0.95, 0.99),
        "wandb": (None, "gpt2"),
    }


def test_settings_read_back_differ_in_nothing():
    assert differences(from_json(to_json(UNUSUAL), "config.json"), UNUSUAL) == {}


def test_a_resumed_run_may_move_but_not_compute_something_else():
    """Every setting, so that a new one is put on one side on purpose."""
    names = differences(SETTINGS, UNUSUAL)
    assert {name for name in names if is_free_on_resume(name, SETTINGS)} == {
        "run_dir",
        "data.path",
        "data.micro_batch_size",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "validation.patience",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "tensorboard",
        "wandb",
        "remat",
        "loss_chunk",
    }
    for name in ("steps", "seed", "dtype", "data.batch_size", "optimizer.beta1", "model.n_inner"):
        assert name in names
        assert not is_free_on_resume(name, SETTINGS)
    assert not is_free_on_resume("meshes", SETTINGS)
    assert not is_free_on_resume("data", SETTINGS)
