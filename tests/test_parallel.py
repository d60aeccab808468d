"""One run, many ways to lay it on devices: the same losses."""

import dataclasses
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt2_jax.data.batches import Windows, training_batches, validation_windows
from gpt2_jax.model import GPT2, param_shapes
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.config_files import to_json
from gpt2_jax.training.engine import make_engine
from gpt2_jax.training.loop import train
from gpt2_jax.training.mesh import make_layout
from gpt2_jax.training.metrics import read_metrics
from gpt2_jax.training.settings import (
    DataSettings,
    MeshSettings,
    OptimizerSettings,
    TrainSettings,
    ValidationSettings,
)
from gpt2_jax.training.step import batch_loss

TOKENS = np.random.default_rng(3).integers(0, 97, 1200).astype(np.uint16)
SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"


@pytest.fixture(scope="module")
def settings(tiny_config, tmp_path_factory):
    """Twenty steps of eight sequences; the vocabulary of 97 is padded to 104 rows."""
    return TrainSettings(
        run_dir=str(tmp_path_factory.mktemp("runs") / "one"),
        steps=20,
        model=dataclasses.replace(tiny_config, pad_vocab_size_multiple=8),
        data=DataSettings(sequence_length=16, batch_size=8, micro_batch_size=1),
        optimizer=OptimizerSettings(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=5),
        validation=ValidationSettings(every=10, windows=5),
        checkpoint_every=10,
        dtype="float32",
        mesh=MeshSettings(data=1),
    )


def run(settings, **changes):
    settings = dataclasses.replace(settings, **changes)
    T = settings.data.sequence_length
    batches = training_batches(Windows([TOKENS[:800]], T), settings.data.batch_size, settings.seed)
    train(settings, batches, validation_windows(Windows([TOKENS[800:]], T), 5))
    return losses(Path(settings.run_dir))


def losses(run_dir):
    records = read_metrics(run_dir / "metrics.jsonl")
    assert len(records) == 20 + 3
    return np.array([record.get("loss", record.get("val_loss")) for record in records])


@pytest.fixture(scope="module")
def on_one_device(settings):
    return run(settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        MeshSettings(data=8),
        MeshSettings(data=4, fsdp=2),
        MeshSettings(data=2, fsdp=2, tensor=2),
    ],
    ids=lambda mesh: f"{mesh.data}x{mesh.fsdp}x{mesh.tensor}",
)
def test_the_losses_do_not_depend_on_the_mesh(settings, on_one_device, mesh, tmp_path):
    actual = run(settings, mesh=mesh, run_dir=str(tmp_path / "run"))
    # float32 sums in another order, over 20 steps of learning.
    np.testing.assert_allclose(actual, on_one_device, rtol=0, atol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "block"])
def test_rematerialisation_does_not_change_the_losses(settings, on_one_device, remat, tmp_path):
    actual = run(settings, remat=remat, run_dir=str(tmp_path / remat))
    np.testing.assert_allclose(actual, on_one_device, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mesh", [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_chunks_of_the_loss_do_not_change_the_losses(settings, on_one_device, mesh, tmp_path):
    chunk = 3 * settings.data.micro_batch_size  # positions at a time, which do not divide T
    assert settings.data.sequence_length % 3
    run_dir = str(tmp_path / "run")
    actual = run(settings, loss_chunk=chunk, mesh=MeshSettings(**mesh), run_dir=run_dir)
    np.testing.assert_allclose(actual, on_one_device, rtol=0, atol=1e-5)


def test_rematerialisation_keeps_less_for_the_backward_pass(tiny_config):
    """By the arrays between forward and backward; XLA:CPU undoes it, so memory shows nothing."""

    def kept(remat):
        model = GPT2(tiny_config, remat=remat)
        tokens_BT = jax.ShapeDtypeStruct((2, 17), np.int32)

        def forward(params, tokens_BT):
            loss = functools.partial(batch_loss, key=jax.random.key(0), model=model)
            return jax.vjp(lambda params: loss(params, tokens_BT), params)[1]

        residuals = jax.eval_shape(forward, param_shapes(tiny_config), tokens_BT)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert kept("none") > kept("dots") > kept("block")


@pytest.mark.slow
def test_with_fsdp_no_activation_travels_and_state_is_shared_out(settings):
    sharded = dataclasses.replace(settings, mesh=MeshSettings(fsdp=8))
    engine = make_engine(sharded, make_layout(sharded))
    state = engine.first_state(jax.random.key(0))
    matrices = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 2]
    assert matrices
    assert all(leaf.addressable_data(0).size == leaf.size // 8 for leaf in matrices)
    hlo = engine.lower_step(16).compile().as_text()
    gathered = {
        line.split(" = ")[1].split("{")[0] for line in hlo.splitlines() if "all-gather(" in line
    }
    shapes = {f"f32[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(state.params)}
    transposed = {
        f"f32[{','.join(map(str, leaf.T.shape))}]" for leaf in jax.tree.leaves(state.params)
    }
    assert gathered
    assert gathered <= shapes | transposed


@pytest.fixture
def two_processes(settings, tmp_path):
    """Starts a run as two processes that meet over gloo, two devices each."""
    shards = tmp_path / "data"
    shards.mkdir()
    np.save(shards / "train_000000.npy", TOKENS[:800])
    np.save(shards / "val_000000.npy", TOKENS[800:])
    processes = []

    def start(**changes):
        data = dataclasses.replace(settings.data, path=str(shards))
        changed = dataclasses.replace(settings, run_dir=str(tmp_path / "run"), data=data, **changes)
        config = tmp_path / "config.json"
        config.write_text(to_json(changed))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        for index in range(2):
            command = [sys.executable, str(SCRIPT), "--config", str(config)]
            command += ["--distributed.coordinator", address]
            command += ["--distributed.num_processes", "2", "--distributed.process_id", str(index)]
            environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, env=environment, **pipes))
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


# What Gloo writes of each connection, but for the numbers between and the line's end.
GLOO = (
    r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : "
)


def without_gloo(output):
    """What a process says by itself: its output, but for Gloo's reports of its connections.

    Gloo's threads write their reports piece by piece, those of several in any order: two reports
    may begin on one line, and what is left of the first, its number, stand alone on the next.
    """
    said = re.sub(GLOO, "", output)
    if said == output:
        return output
    return "".join(line for line in said.splitlines(keepends=True) if line.strip("0123456789\n"))


def test_gloos_reports_are_told_from_what_a_process_says():
    begin, end = "[Gloo] Rank ", " is connected to 3 peer ranks. "
    end += "Expected number of connected peer ranks is : 3\n"
    reports = f"{begin}0{end}{begin}{begin}12{end}{end}{begin}{begin}3{end}2{end}"
    assert without_gloo(reports + "3\n") == ""
    assert without_gloo(f"{begin}step 1\n{reports}7 steps\n") == "step 1\n7 steps\n"
    assert without_gloo("12\n") == "12\n"


def outputs_of(processes):
    """What each says by itself, once both have ended well."""
    texts = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    return [without_gloo(out) for out, _ in texts]


@pytest.mark.slow
def test_two_processes_train_as_one(two_processes, on_one_device, tmp_path):
    """With fsdp across the boundary between them."""
    first, second = outputs_of(two_processes(mesh=MeshSettings(data=1, fsdp=4)))
    assert "finished" in first
    assert second == ""  # one speaks for both
    np.testing.assert_allclose(losses(tmp_path / "run"), on_one_device, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(two_processes, tmp_path):
    processes = two_processes(mesh=MeshSettings(), steps=10**6)
    file = tmp_path / "run" / "metrics.jsonl"
    while all(process.poll() is None for process in processes):
        if file.exists() and file.read_bytes().count(b"\n") > 12:
            break
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    first, second = outputs_of(processes)
    step = int(re.search(r"stopped after (\d+) steps, as another process was told to", first)[1])
    assert second == ""
    assert Checkpoints(tmp_path / "run").newest_intact(["params", "opt_state"]) == step
