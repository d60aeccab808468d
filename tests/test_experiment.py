"""A run put together: weights to start from, and what is measured on the way."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gpt2_jax import experiment
from gpt2_jax.config import GPT2Config
from gpt2_jax.data.batches import Windows, validation_windows
from gpt2_jax.errors import UserError
from gpt2_jax.interop.huggingface import config_to_json, state_dict_from_params
from gpt2_jax.model import GPT2, init_params
from gpt2_jax.training.config_files import from_json
from gpt2_jax.training.metrics import read_metrics
from gpt2_jax.training.settings import (
    DataSettings,
    HellaSwagSettings,
    MeshSettings,
    OptimizerSettings,
    SampleSettings,
    TrainSettings,
    ValidationSettings,
)
from gpt2_jax.training.step import eval_step

TOKENS = np.random.default_rng(0).integers(0, 50257, 400).astype(np.uint16)
SMALL = GPT2Config(n_positions=64, n_embd=4, n_layer=1, n_head=1)


@pytest.fixture
def settings(tmp_path):
    shards = tmp_path / "data"
    shards.mkdir()
    np.save(shards / "train_000000.npy", TOKENS[:300])
    np.save(shards / "val_000000.npy", TOKENS[300:])
    return TrainSettings(
        run_dir=str(tmp_path / "run"),
        steps=2,
        model=dataclasses.replace(SMALL, n_layer=2, resid_pdrop=0.5, pad_vocab_size_multiple=64),
        data=DataSettings(str(shards), sequence_length=16, batch_size=4, micro_batch_size=1),
        optimizer=OptimizerSettings(warmup_steps=1),
        validation=ValidationSettings(every=2, windows=4),
        mesh=MeshSettings(data=2),
        dtype="float32",
    )


@pytest.fixture
def source(tmp_path):
    """A Hugging Face directory, and its parameters."""
    params = init_params(SMALL, jax.random.key(5))
    directory = tmp_path / "model"
    directory.mkdir()
    state = state_dict_from_params(params, SMALL)
    state = {name: np.ascontiguousarray(array) for name, array in state.items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config_to_json(SMALL)))
    return directory, params


def records(settings):
    return read_metrics(Path(settings.run_dir) / "metrics.jsonl")


@pytest.mark.slow
def test_a_run_starts_from_weights_and_takes_their_architecture(settings, source, tmp_path):
    directory, params = source
    settings = dataclasses.replace(settings, init_from=str(directory))
    state = experiment.run(settings)
    held_out = validation_windows(Windows([TOKENS[300:]], 16), 4)
    loss_B = eval_step(params, held_out, model=GPT2(SMALL))
    # One sum of float32 losses near 11, in another order.
    assert records(settings)[0]["val_loss"] == pytest.approx(float(loss_B.mean()), rel=1e-6)
    stored = from_json((tmp_path / "run" / "config.json").read_text(), "config.json").model
    assert stored == dataclasses.replace(SMALL, resid_pdrop=0.5, pad_vocab_size_multiple=64)
    table_VD = state.params["wte"]["embedding"]
    assert table_VD.shape == (50304, 4)
    assert not table_VD[50257:].any()


def test_a_resumed_run_needs_the_weights_it_started_from_no_more(settings, source, tmp_path):
    directory, _ = source
    settings = dataclasses.replace(settings, init_from=str(directory))
    before = experiment.run(settings)
    (directory / "model.safetensors").unlink()
    after = experiment.run(settings, resume=True)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    with pytest.raises(UserError, match="holds no weights"):
        experiment.run(dataclasses.replace(settings, run_dir=str(tmp_path / "other")))


@pytest.mark.slow
def test_a_run_may_start_from_a_run(settings, tmp_path):
    experiment.run(settings)
    again = dataclasses.replace(
        settings, init_from=settings.run_dir, run_dir=str(tmp_path / "again")
    )
    experiment.run(again)
    assert records(again)[0]["val_loss"] == records(settings)[-1]["val_loss"]


@pytest.mark.slow
def test_samples_and_hellaswag_are_recorded_when_they_are_due(settings, tmp_path):
    questions = tmp_path / "hellaswag.jsonl"
    item = {"ctx": "The dog", "endings": [" runs", " sleeps well", " is", " eats it"], "label": 1}
    questions.write_text(f"{json.dumps(item)}\n" * 3)
    settings = dataclasses.replace(
        settings,
        samples=SampleSettings(every=2, prompt="Once", count=3, max_new_tokens=4),
        hellaswag=HellaSwagSettings(str(questions), every=1, items=2),
    )
    experiment.run(settings)
    measured = [record for record in records(settings) if "loss" not in record]
    assert [(sorted(record)[0], record["step"]) for record in measured] == [
        *(("step", 0), ("samples", 0), ("hellaswag_acc", 0)),
        ("hellaswag_acc", 1),
        *(("step", 2), ("samples", 2), ("hellaswag_acc", 2)),
    ]
    texts = measured[1]["samples"]
    assert len(texts) == 3
    assert all(text.startswith("Once") and len(text) > 4 for text in texts)
    assert {measured[2]["hellaswag_acc"], measured[2]["hellaswag_acc_norm"]} <= {0.0, 1.0}


def test_without_its_file_hellaswag_is_left_out(settings):
    absent = dataclasses.replace(settings, hellaswag=HellaSwagSettings("nowhere.jsonl", every=1))
    experiment.run(absent)
    assert not any("hellaswag_acc" in record for record in records(absent))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"init_from": "nowhere"}, "'nowhere' is no directory; give pretrained, gpt2, "),
        ({"samples": SampleSettings(every=1, prompt="x " * 99)}, "more than the context of 64"),
        ({"data": DataSettings("nowhere", 16, 4, 1)}, "nowhere does not exist"),
    ],
)
def test_what_cannot_be_put_together_is_refused_before_anything_is_written(
    settings, tmp_path, changes, rule
):
    with pytest.raises(UserError, match=rule):
        experiment.run(dataclasses.replace(settings, **changes))
    assert not (tmp_path / "run").exists()


def test_samples_need_gpt_2s_vocabulary(settings):
    small = dataclasses.replace(settings.model, vocab_size=97, eos_token_id=None)
    np.save(Path(settings.data.path) / "train_000000.npy", TOKENS[:300] % 97)
    np.save(Path(settings.data.path) / "val_000000.npy", TOKENS[300:] % 97)
    with pytest.raises(UserError, match=r"samples.every needs GPT-2's 50257 tokens"):
        experiment.run(dataclasses.replace(settings, model=small, samples=SampleSettings(every=1)))
