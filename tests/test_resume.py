"""Runs that are killed, stopped, damaged and moved go on as if nothing had happened."""

import contextlib
import dataclasses
import io
import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt2_jax.data.batches import Windows, training_batches, validation_windows
from gpt2_jax.errors import UserError
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.config_files import from_json, to_json
from gpt2_jax.training.loop import train
from gpt2_jax.training.metrics import read_metrics
from gpt2_jax.training.settings import (
    DataSettings,
    MeshSettings,
    OptimizerSettings,
    TrainSettings,
    ValidationSettings,
)
from gpt2_jax.training.validation import Probe

TOKENS = np.random.default_rng(3).integers(0, 97, 600).astype(np.uint16)
SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"


@pytest.fixture(scope="module")
def settings(shallow_config):
    """Dropout is on: its randomness too must come back."""
    return TrainSettings(
        run_dir="unset",
        steps=12,
        model=dataclasses.replace(shallow_config, resid_pdrop=0.1),
        data=DataSettings(sequence_length=8, batch_size=4, micro_batch_size=1),
        optimizer=OptimizerSettings(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=2),
        validation=ValidationSettings(every=4, windows=5),
        checkpoint_every=3,
        log_every=5,
        dtype="float32",
        mesh=MeshSettings(data=1),
    )


def run(settings, run_dir, **options):
    settings = dataclasses.replace(settings, run_dir=str(run_dir))
    T = settings.data.sequence_length
    windows = Windows([TOKENS[:400]], T)
    batches = training_batches(windows, settings.data.batch_size, settings.seed)
    held_out = validation_windows(Windows([TOKENS[400:]], T), settings.validation.windows)
    return train(
        settings, batches, held_out, fingerprints={"data": windows.fingerprint()}, **options
    )


def records(run_dir):
    """All of metrics.jsonl but the speed, and but what the tests' own probe wrote."""
    return [
        {name: value for name, value in record.items() if name != "tokens_per_second"}
        for record in read_metrics(run_dir / "metrics.jsonl")
        if "stop" not in record
    ]


def newest_state(run_dir, like):
    checkpoints = Checkpoints(run_dir)
    return checkpoints.restore(checkpoints.newest_intact(["params", "opt_state"]), like)


def assert_same_state(state, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(other))


def stop_after(steps):
    """A probe that sends this process SIGTERM after so many steps; one more is on its way."""

    def make(*_):
        count = itertools.count()

        def measure(_):
            if next(count) == steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return {"stop": 0.0}

        return measure

    return Probe("stop", 1, make)


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    return run_dir, run(settings, run_dir)


def test_a_run_stopped_by_a_signal_goes_on_bit_for_bit(settings, undisturbed, tmp_path, capsys):
    """Between checkpoints, and where a validation was due."""
    for steps, expected in ((5, 6), (1, 8), (2, 11)):
        state = run(settings, tmp_path, probes=[stop_after(steps)])
        assert state.step == expected
        assert f"stopped by SIGTERM after {expected} steps" in capsys.readouterr().out
    state = run(settings, tmp_path, resume=True)
    assert "resuming after step 11" in capsys.readouterr().out
    assert_same_state(state, undisturbed[1])
    assert records(tmp_path) == records(undisturbed[0])


@pytest.mark.slow
def test_a_run_moves_to_more_devices_with_the_same_batches(settings, tmp_path):
    model = dataclasses.replace(settings.model, resid_pdrop=0.0)  # masks follow the passes
    settings = dataclasses.replace(settings, model=model)
    run(settings, tmp_path / "still")
    for mesh in (MeshSettings(data=1), MeshSettings(data=2), MeshSettings(data=2, fsdp=2)):
        moved = dataclasses.replace(settings, mesh=mesh)
        run(moved, tmp_path / "moved", probes=[stop_after(3)] if mesh.fsdp == 1 else [])
    pairs = list(zip(records(tmp_path / "moved"), records(tmp_path / "still"), strict=True))
    assert len(pairs) == 12 + 4
    for moved, still in pairs:
        assert moved.keys() == still.keys()
        # float32 sums over the batch in another order.
        assert list(moved.values()) == pytest.approx(list(still.values()), abs=1e-5)


def _child(settings, run_dir):
    """Trains in a process of its own, to be killed."""
    os.environ["JAX_NUM_CPU_DEVICES"] = "1"
    with contextlib.redirect_stdout(io.StringIO()):
        run(settings, run_dir)


@pytest.mark.slow
def test_killed_at_ten_random_moments_a_run_ends_as_if_undisturbed(settings, tmp_path):
    settings = dataclasses.replace(settings, steps=66, checkpoint_every=2)
    context = multiprocessing.get_context("forkserver")
    # The server imports all this once; nothing there has touched a device yet.
    context.set_forkserver_preload(["gpt2_jax.training.loop", "optax", "grain"])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    draw = random.Random(20261123)
    for kill in range(10):
        process = context.Process(target=_child, args=(settings, killed))
        process.start()
        lines = 6 * kill + draw.randrange(1, 7)
        while process.is_alive() and _lines(killed) < lines:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        assert process.is_alive()
        process.kill()
        process.join()
    for run_dir in (whole, killed):
        process = context.Process(target=_child, args=(settings, run_dir))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert records(killed) == records(whole)
    assert len(records(whole)) == 66 + 18
    like = run(settings, whole)
    assert_same_state(newest_state(killed, like), like)


def _lines(run_dir):
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture
def config_file(settings, tmp_path):
    """A run of the script, too long to end by itself, on shards in tmp_path."""
    shards = tmp_path / "data"
    shards.mkdir()
    np.save(shards / "train_000000.npy", TOKENS[:400])
    np.save(shards / "val_000000.npy", TOKENS[400:])
    data = dataclasses.replace(settings.data, path=str(shards))
    run_dir = str(tmp_path / "run")
    long = dataclasses.replace(settings, steps=10**6, data=data, run_dir=run_dir)
    file = tmp_path / "config.json"
    file.write_text(to_json(long))
    return file


def start(config_file, *flags, limit="unlimited"):
    command = [sys.executable, str(SCRIPT), "--config", str(config_file), *map(str, flags)]
    return subprocess.Popen(
        ["bash", "-c", f'ulimit -f {limit} && exec "$@"', "bash", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
    )


def test_a_signal_ends_the_script_with_status_0_and_a_checkpoint(config_file, tmp_path):
    process = start(config_file)
    while process.poll() is None and _lines(tmp_path / "run") < 20:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    stopped = re.search(r"stopped by SIGTERM after (\d+) steps; the same command goes on", out)
    assert stopped
    assert "finished" not in out
    step = int(stopped[1])
    assert Checkpoints(tmp_path / "run").newest_intact(["params", "opt_state"]) == step
    steps = [record["step"] for record in records(tmp_path / "run") if "loss" in record]
    assert steps == list(range(step))


@pytest.mark.slow
def test_a_full_disk_stops_the_run_in_one_line_and_spoils_nothing(config_file, tmp_path, capsys):
    run_dir = tmp_path / "run"
    settings = from_json(config_file.read_text(), "config.json")
    run(dataclasses.replace(settings, steps=3), run_dir)
    size = max(file.stat().st_size for file in (run_dir / "checkpoints/3").rglob("*"))

    # In kilobytes: no file may grow to the size of a checkpoint's largest.
    process = start(config_file, "--steps", 6, "--allow_changes", limit=size // 2048)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    *notes, line = err.splitlines()
    assert re.fullmatch(
        r"error: cannot write .* File too large.*; the checkpoint of step 3 is intact; "
        r"free space or permissions, .*",
        line,
    )
    assert notes[0] == "resuming with changed settings: steps was 3, now 6"
    assert "Traceback" not in err  # JAX may add that it could not keep a compiled program
    capsys.readouterr()
    assert run(dataclasses.replace(settings, steps=6), run_dir, allow_changes=True).step == 6
    assert "resuming after step 3" in capsys.readouterr().out
    assert [r["step"] for r in records(run_dir) if "loss" in r] == list(range(6))


@pytest.mark.parametrize("damage", ["flipped bit", "cut short"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    settings, undisturbed, tmp_path, capsys, damage
):
    run(settings, tmp_path, probes=[stop_after(7)])
    newest = tmp_path / "checkpoints" / "8"
    file = max((newest / "opt_state").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    if damage == "flipped bit":
        data[len(data) // 2] ^= 1
    file.write_bytes(data if damage == "flipped bit" else data[:-1])
    capsys.readouterr()

    state = run(settings, tmp_path)
    out, err = capsys.readouterr()
    assert re.fullmatch(
        rf"checkpoint {newest} is left out: its file opt_state/.* "
        r"has (changed since it was written|\d+ bytes, not \d+)\n",
        err,
    )
    assert "resuming after step 6" in out
    assert_same_state(state, undisturbed[1])
    assert records(tmp_path) == records(undisturbed[0])
    assert (tmp_path / "damaged" / "8").is_dir()


def test_when_all_checkpoints_are_damaged_nothing_is_lost_or_begun_anew(settings, tmp_path):
    run(settings, tmp_path, probes=[stop_after(2)])
    (tmp_path / "checkpoints" / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact; .*--overwrite"):
        run(settings, tmp_path)
    assert {path: path.read_bytes() for path in before} == before


def test_changed_data_are_noticed(settings, tmp_path):
    run(settings, tmp_path, probes=[stop_after(4)])
    windows = Windows([TOKENS[1:401]], 8)
    arguments = (
        dataclasses.replace(settings, run_dir=str(tmp_path)),
        training_batches(windows, settings.data.batch_size, settings.seed),
        validation_windows(Windows([TOKENS[400:]], 8), 5),
    )
    with pytest.raises(UserError, match=r"training data have changed .*--allow_changes"):
        train(*arguments, fingerprints={"data": windows.fingerprint()})
    assert (
        train(*arguments, fingerprints={"data": windows.fingerprint()}, allow_changes=True).step
        == 12
    )
