"""A whole run, very small: what it leaves on disk, and that it can be done again."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.data.batches import Windows, training_batches, validation_windows
from gpt2_jax.errors import UserError
from gpt2_jax.model import GPT2
from gpt2_jax.sources import load_source
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.config_files import from_json, to_json
from gpt2_jax.training.loop import train
from gpt2_jax.training.metrics import read_metrics
from gpt2_jax.training.optimizer import learning_rate_schedule
from gpt2_jax.training.settings import (
    DataSettings,
    MeshSettings,
    OptimizerSettings,
    TrainSettings,
    ValidationSettings,
)
from gpt2_jax.training.step import eval_step
from gpt2_jax.training.validation import Probe

STEPS = 6
TOKENS = np.random.default_rng(3).integers(0, 97, 200).astype(np.uint16)
VALIDATION_NT = validation_windows(Windows([TOKENS[100:]], 8), 5)


@pytest.fixture(scope="module")
def settings(shallow_config, tmp_path_factory):
    return TrainSettings(
        run_dir=str(tmp_path_factory.mktemp("runs") / "small"),
        steps=STEPS,
        model=shallow_config,
        data=DataSettings(sequence_length=8, batch_size=4, micro_batch_size=2),
        optimizer=OptimizerSettings(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=2),
        validation=ValidationSettings(every=4),
        checkpoint_every=4,
        log_every=3,
        dtype="float32",
        mesh=MeshSettings(data=1),
    )


def batches(settings):
    windows = Windows([TOKENS[:100]], settings.data.sequence_length)
    return training_batches(windows, settings.data.batch_size, settings.seed)


@pytest.fixture(scope="module")
def finished(settings):
    """A finished run's directory and its final state."""
    return Path(settings.run_dir), train(settings, batches(settings), VALIDATION_NT)


def test_a_run_leaves_its_settings_metrics_picture_and_checkpoints(settings, finished):
    run_dir, state = finished
    assert sorted(file.name for file in run_dir.iterdir()) == [
        "checkpoints",
        "config.json",
        "loss.png",
        "metrics.jsonl",
    ]
    assert from_json((run_dir / "config.json").read_text(), "config.json") == settings
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {file.name for file in (run_dir / "checkpoints").iterdir()} == {"4", "6"}
    assert state.step == STEPS


def test_metrics_are_complete_and_in_order(settings, finished):
    run_dir, _ = finished
    records = read_metrics(run_dir / "metrics.jsonl")
    kinds = [("val_loss" if "val_loss" in record else "loss", record["step"]) for record in records]
    assert kinds == [
        ("val_loss", 0),
        *(("loss", step) for step in range(4)),
        ("val_loss", 4),
        *(("loss", step) for step in range(4, STEPS)),
        ("val_loss", STEPS),
    ]
    schedule = learning_rate_schedule(settings.optimizer, STEPS)
    for record in records:
        if "val_loss" in record:
            assert set(record) == {"step", "val_loss"}
        else:
            assert set(record) == {
                "step",
                "loss",
                "grad_norm",
                "learning_rate",
                "skipped",
                "tokens_per_second",
            }
            assert record["learning_rate"] == float(schedule(record["step"]))
            assert record["tokens_per_second"] > 0
        assert all(math.isfinite(value) for value in record.values())


def test_the_validation_loss_is_the_mean_over_its_windows(settings, finished):
    """Five windows do not fill the batches of two; the one that fills up does not count."""
    run_dir, state = finished
    evaluate = jax.jit(eval_step, static_argnames="model")
    loss_N = evaluate(state.params, VALIDATION_NT, model=GPT2(settings.model))
    last = read_metrics(run_dir / "metrics.jsonl")[-1]
    # The mean of five float32 losses near 5, in another order.
    assert last["val_loss"] == pytest.approx(float(loss_N.mean()), rel=1e-6)


def test_the_last_checkpoint_is_the_final_state(finished):
    run_dir, state = finished
    restored = Checkpoints(run_dir).restore(STEPS, state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_scripts_open_a_run_as_a_source(settings, finished):
    run_dir, state = finished
    params, config = load_source(str(run_dir))
    assert config == settings.model
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_a_run_without_a_checkpoint_is_no_source_yet(settings, tmp_path):
    (tmp_path / "config.json").write_text(to_json(settings))
    with pytest.raises(UserError, match="no checkpoints yet"):
        load_source(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def losses(run_dir):
    records = read_metrics(run_dir / "metrics.jsonl")
    return [record.get("loss", record.get("val_loss")) for record in records]


def test_a_run_is_replaced_only_when_asked_for_and_then_gives_the_same(settings, finished):
    run_dir, state = finished
    before = {file: file.read_bytes() for file in run_dir.iterdir() if file.is_file()}
    first = losses(run_dir)
    longer = dataclasses.replace(settings, steps=STEPS + 1)
    with pytest.raises(UserError, match=r"already holds a run .*steps was 6, now 7.*--overwrite"):
        train(longer, batches(settings), VALIDATION_NT)
    assert {file: file.read_bytes() for file in before} == before

    (run_dir / "notes.txt").write_text("mine")
    again = train(settings, batches(settings), VALIDATION_NT, overwrite=True)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert losses(run_dir) == first
    assert (run_dir / "notes.txt").read_text() == "mine"
    (run_dir / "notes.txt").unlink()


def test_a_finished_run_is_left_as_it_is(settings, finished):
    run_dir, state = finished
    before = (run_dir / "metrics.jsonl").read_bytes()
    again = train(settings, batches(settings), VALIDATION_NT)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_run_that_diverges_skips_its_steps_then_stops_and_says_what_to_do(settings, tmp_path):
    wild = dataclasses.replace(
        settings,
        run_dir=str(tmp_path / "wild"),
        optimizer=OptimizerSettings(learning_rate=1e30, warmup_steps=0, max_skipped_steps=2),
    )
    with pytest.raises(UserError, match=r"step 2: .* 2 steps in a row .*learning_rate"):
        train(wild, batches(wild), VALIDATION_NT)
    _, *steps = read_metrics(tmp_path / "wild" / "metrics.jsonl")
    assert [(step["step"], step["skipped"]) for step in steps] == [(0, 0), (1, 1), (2, 2)]
    assert steps[2]["grad_norm"] is None
    assert (tmp_path / "wild" / "loss.png").exists()


def test_what_is_measured_on_the_way_leaves_the_training_as_it_was(settings, finished, tmp_path):
    _, state = finished
    calls = []

    def make(model, layout):
        assert model.config == settings.model
        assert layout.mesh.size == 1

        def measure(params):
            calls.append(float(jax.tree.leaves(params)[0].sum()))
            return {"extra": jnp.asarray(len(calls), jnp.float32), "samples": ["text"]}

        return measure

    probed = dataclasses.replace(settings, run_dir=str(tmp_path / "probed"))
    again = train(probed, batches(settings), VALIDATION_NT, probes=[Probe("extra", 3, make)])
    jax.tree.map(np.testing.assert_array_equal, again, state)
    records = read_metrics(tmp_path / "probed" / "metrics.jsonl")
    assert [record for record in records if "extra" in record] == [
        {"step": step, "extra": number, "samples": ["text"]}
        for step, number in ((0, 1.0), (3, 2.0), (6, 3.0))
    ]


def test_training_starts_from_given_parameters(settings, finished, tmp_path):
    _, state = finished
    host = jax.device_get(state.params)
    start = dataclasses.replace(settings, run_dir=str(tmp_path / "tuned"))
    train(start, batches(settings), VALIDATION_NT, initial_params=host)
    first = read_metrics(tmp_path / "tuned" / "metrics.jsonl")[0]
    last = read_metrics(Path(settings.run_dir) / "metrics.jsonl")[-1]
    assert first["val_loss"] == last["val_loss"]


def test_a_profile_is_written_where_the_run_is(settings, tmp_path):
    traced = dataclasses.replace(settings, run_dir=str(tmp_path / "traced"))
    train(traced, batches(settings), VALIDATION_NT, profile=True)
    assert list((tmp_path / "traced" / "profile").rglob("*.xplane.pb"))


def test_nothing_is_compiled_once_everything_ran(settings, tmp_path):
    """A compilation in mid-run would stall every device."""
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
    )
    counts = []

    def measure(_):
        counts.append(len(compilations))
        return {"count": 0.0}

    long = dataclasses.replace(settings, run_dir=str(tmp_path / "long"), steps=16)
    train(long, batches(settings), VALIDATION_NT, probes=[Probe("count", 4, lambda *_: measure)])
    assert counts[0] > 0
    # Steps, validation and a checkpoint lie between these.
    assert counts[2] == counts[3] == counts[4]


def test_a_directory_that_cannot_be_made_is_named(settings, tmp_path):
    (tmp_path / "file").write_text("")
    in_the_way = dataclasses.replace(settings, run_dir=str(tmp_path / "file" / "run"))
    with pytest.raises(UserError, match="cannot write run directory"):
        train(in_the_way, batches(settings), VALIDATION_NT)
