"""Checkpoints: what was saved comes back bit for bit, or is named and the one before it used."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt2_jax.errors import UserError
from gpt2_jax.model import param_shapes
from gpt2_jax.training import checkpoint as checkpoint_module
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.manifest import DamagedError, read_manifest, verify, write_manifest
from gpt2_jax.training.mesh import Layout, make_mesh
from gpt2_jax.training.optimizer import make_optimizer
from gpt2_jax.training.resume import first_step
from gpt2_jax.training.settings import MeshSettings, OptimizerSettings
from gpt2_jax.training.step import TrainState

PARTS = ["params", "opt_state"]


@pytest.fixture(scope="module")
def state(shallow_params):
    """A state in mid-training: every array of the optimizer holds something else."""
    optimizer = make_optimizer(OptimizerSettings(), optax.constant_schedule(1e-3))
    rng = np.random.default_rng(0)
    opt_state = jax.tree.map(
        lambda leaf: (
            jnp.asarray(rng.integers(1, 1000, leaf.shape), leaf.dtype) / 7
            if leaf.dtype == jnp.float32
            else leaf + 17
            if leaf.dtype == jnp.int32
            else leaf
        ),
        optimizer.init(shallow_params),
    )
    return TrainState(jnp.asarray(17, jnp.int32), shallow_params, opt_state)


@pytest.fixture(scope="module")
def original(tmp_path_factory, state):
    """A run with checkpoints 17 and 18, which nobody changes."""
    run_dir = tmp_path_factory.mktemp("runs") / "original"
    save(run_dir, state, 17, 18)
    return run_dir


@pytest.fixture
def run_dir(tmp_path, original):
    """A copy of it to break."""
    return Path(shutil.copytree(original, tmp_path / "run"))


def at(state, step):
    return state._replace(step=jnp.asarray(step, jnp.int32))


def save(run_dir, state, *steps, keep=10, losses=None):
    with Checkpoints(run_dir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(at(state, step), {"val_loss": (losses or {}).get(step), "data": "d"})


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for array, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(array, other, strict=True)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def abstract(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def test_a_state_comes_back_bit_for_bit(original, state):
    checkpoints = Checkpoints(original)
    assert_same(checkpoints.restore(17, abstract(state)), state)
    assert_same(checkpoints.restore(18, abstract(state)), at(state, 18))


def test_parameters_come_back_alone_and_on_one_device(original, state, shallow_config):
    params = Checkpoints(original).restore_params(param_shapes(shallow_config))
    assert_same(params, state.params)
    assert {device for leaf in jax.tree.leaves(params) for device in leaf.devices()} == {
        jax.devices()[0]
    }


def test_numbers_that_are_hard_to_store_come_back(tmp_path, state):
    hard = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38, 1 / 3], np.float32)
    odd = TrainState(state.step, {"wte": jnp.asarray(hard)}, {"count": jnp.asarray(2**31 - 1)})
    save(tmp_path, odd, 1)
    restored = Checkpoints(tmp_path).restore(1, abstract(odd))
    assert np.asarray(restored.params["wte"]).tobytes() == hard.tobytes()
    assert_same(restored.opt_state, odd.opt_state)


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path, state):
    mortal = jax.tree.map(jnp.copy, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(mortal)
        for leaf in jax.tree.leaves(mortal):
            leaf.delete()
    assert_same(Checkpoints(tmp_path).restore(17, abstract(state)), state)


MESHES = [(1, 1, 1), (8, 1, 1), (4, 2, 1), (2, 2, 2)]


@pytest.mark.parametrize("after", MESHES)
@pytest.mark.parametrize("before", [(1, 1, 1), (2, 2, 2)])
def test_a_state_may_move_to_another_mesh(tmp_path, state, before, after):
    def lay_out(sizes):
        return Layout(make_mesh(MeshSettings(*sizes)), rows=8, passes=1)

    save(tmp_path, lay_out(before).place(state), 17)
    there = abstract(lay_out(after).place(state))
    moved = Checkpoints(tmp_path).restore(17, there)
    assert_same(moved, state)
    # As `there` wants them, or the compiled step would not take them.
    assert jax.tree.map(lambda leaf: leaf.sharding, moved) == jax.tree.map(
        lambda leaf: leaf.sharding, there
    )


def test_facts_are_recorded_with_a_checkpoint(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(state, 3), {"val_loss": 3.25, "data": "abc"})
        checkpoints.save(at(state, 4))
    facts = Checkpoints(tmp_path).facts(3)
    assert (facts["step"], facts["val_loss"], facts["data"]) == (3, 3.25, "abc")
    assert Checkpoints(tmp_path).facts(4)["val_loss"] is None


@pytest.mark.parametrize(
    ("keep", "losses", "left"),
    [
        (1, {}, [5]),
        (2, {}, [4, 5]),
        (9, {}, [1, 2, 3, 4, 5]),
        (1, {1: 3.0, 2: 2.0, 3: 2.5}, [2, 5]),
        (2, {1: 3.0, 5: 2.0}, [4, 5]),
        (1, {1: 2.0, 2: 2.0}, [1, 5]),
        (2, {1: 0.0, 2: 1.0}, [1, 4, 5]),
    ],
)
def test_the_latest_and_the_best_are_kept(tmp_path, state, keep, losses, left):
    save(tmp_path, state, 1, 2, 3, 4, 5, keep=keep, losses=losses)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == checkpoints.finished() == left
    assert names(checkpoints.directory) == [str(step) for step in left]


def test_steps_are_numbers_not_text(tmp_path, state):
    save(tmp_path, state, 9, 10, 100, keep=2)
    assert Checkpoints(tmp_path).finished() == [10, 100]
    assert Checkpoints(tmp_path).newest_intact(PARTS) == 100


def test_the_best_stays_the_best_after_a_resume(tmp_path, state):
    save(tmp_path, state, 1, 2, keep=1, losses={1: 2.0, 2: 3.0})
    save(tmp_path, state, 3, 4, keep=1, losses={3: 2.5, 4: 2.25})
    assert Checkpoints(tmp_path).finished() == [1, 4]


def test_a_run_without_checkpoints_says_so(tmp_path, shallow_config):
    for run_dir in (tmp_path, tmp_path / "nowhere"):
        checkpoints = Checkpoints(run_dir)
        assert checkpoints.steps() == checkpoints.finished() == []
        assert checkpoints.newest_intact(PARTS) is None
        checkpoints.set_aside_newer_than(None)
        assert "no checkpoint was saved" in checkpoints.describe_last_good()
        with pytest.raises(UserError, match="holds no finished checkpoint"):
            checkpoints.restore_params(param_shapes(shallow_config))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_model_is_refused(original, shallow_config):
    deeper = param_shapes(dataclasses.replace(shallow_config, n_layer=3))
    with pytest.raises(UserError, match=r"checkpoints/18 is of another model: its h_1/attn"):
        Checkpoints(original).restore_params(deeper)
    wider = param_shapes(dataclasses.replace(shallow_config, n_embd=64))
    with pytest.raises(UserError, match=r"its h_0/attn/c_attn/bias is \(96,\), .* \(192,\)"):
        Checkpoints(original).restore_params(wider)


# Damage


def files(checkpoint):
    return sorted(file for file in checkpoint.rglob("*") if file.is_file())


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file):
    os.truncate(file, max(file.stat().st_size - 2, 0))


def empty(file):
    os.truncate(file, 0)


def extend(file):
    with file.open("ab") as data:
        data.write(b"\0")


@pytest.mark.parametrize("damage", [flip, truncate, empty, extend, Path.unlink])
def test_damage_to_any_file_is_noticed_and_the_one_before_is_used(run_dir, capsys, damage):
    newest = run_dir / "checkpoints" / "18"
    checkpoints = Checkpoints(run_dir)
    damaged = 0
    for file in files(newest):
        before = file.read_bytes()
        if not before and damage in (flip, truncate, empty):
            continue  # Orbax's empty marker has no byte to lose
        damage(file)
        assert checkpoints.newest_intact(PARTS) == 17, file
        (line,) = capsys.readouterr().err.splitlines()
        assert str(newest) in line
        name = file.relative_to(newest).as_posix()
        assert name in line or (name == "manifest.json" and "was not finished" in line)
        file.write_bytes(before)
        damaged += 1
    assert damaged >= 10
    assert checkpoints.newest_intact(PARTS) == 18
    assert capsys.readouterr().err == ""


def test_the_one_before_is_restored_whole(run_dir, state):
    for file in files(run_dir / "checkpoints" / "18" / "params"):
        flip(file)
    checkpoints = Checkpoints(run_dir)
    assert_same(checkpoints.restore(checkpoints.newest_intact(PARTS), abstract(state)), state)


def test_every_single_bit_of_the_manifest_counts(run_dir, capsys):
    """Also those of its own digest and its facts, which no file's digest covers."""
    manifest = run_dir / "checkpoints" / "18" / "manifest.json"
    text = manifest.read_bytes()
    checkpoints = Checkpoints(run_dir)
    for position in range(0, len(text), 97):
        for bit in (0, 7):
            changed = bytearray(text)
            changed[position] ^= 1 << bit
            manifest.write_bytes(changed)
            assert checkpoints.newest_intact(PARTS) == 17
            assert "checkpoints/18 is left out: its manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"{}", b"{}\n", b"null\nnull\n", b"\xff\xfe", b"\0" * 4096]
)
def test_a_manifest_that_is_none_is_no_manifest(run_dir, capsys, text):
    (run_dir / "checkpoints" / "18" / "manifest.json").write_bytes(text)
    assert Checkpoints(run_dir).newest_intact(PARTS) == 17
    assert "manifest.json" in capsys.readouterr().err


def test_the_manifest_of_another_checkpoint_is_noticed(run_dir):
    flip(files(run_dir / "checkpoints" / "18" / "params")[0])
    shutil.copy(run_dir / "checkpoints" / "17" / "manifest.json", run_dir / "checkpoints" / "18")
    assert Checkpoints(run_dir).newest_intact(PARTS) == 17


def test_parameters_alone_do_not_need_an_intact_optimizer(run_dir, state, shallow_config, capsys):
    for file in files(run_dir / "checkpoints" / "18" / "opt_state"):
        flip(file)
    checkpoints = Checkpoints(run_dir)
    assert checkpoints.newest_intact(["params"]) == 18
    assert_same(checkpoints.restore_params(param_shapes(shallow_config)), state.params)
    assert capsys.readouterr().err == ""
    assert checkpoints.newest_intact(PARTS) == 17


def test_damaged_parameters_are_never_read(run_dir, state, shallow_config, capsys):
    flip(files(run_dir / "checkpoints" / "18" / "params")[0])
    params = Checkpoints(run_dir).restore_params(param_shapes(shallow_config))
    assert_same(params, state.params)
    assert "checkpoints/18 is left out" in capsys.readouterr().err


def test_if_all_are_damaged_the_run_is_not_started_anew(run_dir, shallow_config):
    for step in ("17", "18"):
        flip(files(run_dir / "checkpoints" / step / "opt_state")[0])
        flip(files(run_dir / "checkpoints" / step / "params")[0])
    checkpoints = Checkpoints(run_dir)
    assert checkpoints.newest_intact(PARTS) is None
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact.*--overwrite"):
        first_step(checkpoints, {})
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        checkpoints.restore_params(param_shapes(shallow_config))
    assert checkpoints.finished() == [17, 18]


def test_a_run_goes_on_although_an_older_checkpoint_is_damaged(run_dir, state):
    """Nobody needs it, but what is kept is chosen among all."""
    flip(run_dir / "checkpoints" / "17" / "manifest.json")
    save(run_dir, state, 19, keep=2)
    assert Checkpoints(run_dir).newest_intact(PARTS) == 19
    assert {18, 19} <= set(Checkpoints(run_dir).finished())


# Where a resumed run begins


def test_a_resumed_run_begins_at_the_newest_and_moves_damaged_ones_aside(run_dir, state, capsys):
    save(run_dir, state, 19)
    flip(files(run_dir / "checkpoints" / "19" / "params")[0])
    bytes_19 = {file.name: file.read_bytes() for file in files(run_dir / "checkpoints" / "19")}
    checkpoints = Checkpoints(run_dir)
    assert first_step(checkpoints, {}) == 18
    assert checkpoints.steps() == [17, 18]
    aside = run_dir / "damaged" / "19"
    assert {file.name: file.read_bytes() for file in files(aside)} == bytes_19
    assert "19 is left out" in capsys.readouterr().err

    # A second one of that step takes its place.
    save(run_dir, state, 19)
    empty(files(run_dir / "checkpoints" / "19" / "params")[0])
    assert first_step(Checkpoints(run_dir), {}) == 18
    assert files(aside)[0].exists()
    save(run_dir, state, 19)
    assert first_step(Checkpoints(run_dir), {}) == 19


def test_what_was_never_finished_is_cleared_away(run_dir, capsys):
    directory = run_dir / "checkpoints"
    (directory / "18" / "manifest.json").unlink()
    (directory / "19.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (directory / "19.orbax-checkpoint-tmp" / "params" / "half").write_text("x")
    assert first_step(Checkpoints(run_dir), {}) == 17
    assert names(directory) == ["17"]
    assert "18 is left out: it was not finished" in capsys.readouterr().err


def test_a_run_stopped_before_its_first_checkpoint_begins_anew(run_dir):
    for step in ("17", "18"):
        (run_dir / "checkpoints" / step / "manifest.json").unlink()
    checkpoints = Checkpoints(run_dir)
    assert checkpoints.finished() == []
    assert first_step(checkpoints, {"data": "whatever data"}) == 0
    assert first_step(Checkpoints(run_dir.parent / "none"), {}) == 0


def test_what_is_not_a_checkpoint_is_left_alone(run_dir):
    """Someone's copy of a good checkpoint is the last thing to delete."""
    directory = run_dir / "checkpoints"
    shutil.copytree(directory / "17", directory / "17-backup")
    (directory / "README").write_text("mine")
    assert Checkpoints(run_dir).steps() == [17, 18]
    assert first_step(Checkpoints(run_dir), {}) == 18
    assert (directory / "README").read_text() == "mine"
    verify(directory / "17-backup", PARTS)


def test_other_training_data_are_noticed(run_dir):
    checkpoints = Checkpoints(run_dir)
    assert first_step(checkpoints, {"data": "d"}) == 18
    assert first_step(checkpoints, {}) == 18
    with pytest.raises(UserError, match=r"data have changed since checkpoint 18 .*--allow_changes"):
        first_step(checkpoints, {"data": "other"})


# Errors while writing


def test_a_failed_write_names_what_is_safe(tmp_path, state, monkeypatch):
    save(tmp_path, state, 17)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_module, "write_manifest", fail)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(state, 18))
    with pytest.raises(UserError) as caught:
        checkpoints.wait()
    message = str(caught.value)
    assert "cannot write the checkpoint of step 18" in message
    assert str(tmp_path / "checkpoints") in message
    assert "No space left on device" in message
    assert "the checkpoint of step 17 is intact" in message
    checkpoints.wait()  # told once
    monkeypatch.undo()
    assert checkpoints.newest_intact(PARTS) == 17
    assert_same(checkpoints.restore(17, abstract(state)), state)
    # The same command goes on, and the step is saved after all.
    assert first_step(checkpoints, {}) == 17
    save(tmp_path, state, 18)
    assert Checkpoints(tmp_path).newest_intact(PARTS) == 18


def test_a_failed_write_is_noticed_without_waiting_for_one_that_runs(tmp_path, state, monkeypatch):
    go_on = threading.Event()

    def fail_later(*_):
        go_on.wait()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint_module, "write_manifest", fail_later)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.check()
    checkpoints.save(state)
    checkpoints.check()  # still running: returns at once
    go_on.set()
    with pytest.raises(UserError, match=r"step 17 .*Input/output error.*no checkpoint was saved"):
        checkpoints.save(at(state, 18))


def test_leaving_the_context_waits_for_the_last_write(tmp_path, state, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    assert checkpoints.finished() == [17]

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_module, "write_manifest", fail)
    with (
        pytest.raises(UserError, match="the checkpoint of step 17 is intact"),
        Checkpoints(tmp_path) as checkpoints,
    ):
        checkpoints.save(at(state, 18))


WRITER = """
import resource, signal, sys
from pathlib import Path
import jax.numpy as jnp, numpy as np
from gpt2_jax.errors import UserError
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.step import TrainState

def state(step):
    noise = np.random.default_rng(step).normal(size=(300, 300)).astype(np.float32)
    return TrainState(jnp.asarray(step, jnp.int32), {"wte": jnp.asarray(noise)}, {"n": noise})

run_dir = Path(sys.argv[1])
try:
    with Checkpoints(run_dir) as checkpoints:
        checkpoints.save(state(1))
        checkpoints.wait()
        EVIL
        checkpoints.save(state(2))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "evil",
    [
        # No file may grow beyond 4,096 bytes: what a full disk does to Orbax' own threads.
        """signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))""",
        # Root may write to a directory of mode 500: a file in its place stops it too.
        """(run_dir / "checkpoints").rename(run_dir / "moved")
        (run_dir / "checkpoints").write_text("")""",
    ],
    ids=["full disk", "no directory"],
)
def test_what_orbax_cannot_write_is_one_line_and_leaves_the_last_intact(tmp_path, evil):
    """In a process of its own: Orbax leaves coroutines behind, which warn at some later time."""
    done = subprocess.run(
        [sys.executable, "-c", WRITER.replace("EVIL", evil), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,  # Orbax would wait five minutes for a directory that nobody makes
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot write the checkpoint of step 2 to ")
    if (tmp_path / "moved").exists():
        (tmp_path / "checkpoints").unlink()
        (tmp_path / "moved").rename(tmp_path / "checkpoints")
    assert Checkpoints(tmp_path).newest_intact(PARTS) == 1


# The manifest by itself


def make_checkpoint(directory):
    for name in ("params/d/0", "params/d/1", "opt_state/x", "top", "empty"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("" if name == "empty" else f"content of {name}")


def test_a_manifest_lists_every_file_and_the_facts(tmp_path):
    make_checkpoint(tmp_path)
    write_manifest(tmp_path, {"step": 3, "data": "größe"})
    manifest = read_manifest(tmp_path)
    assert (manifest["step"], manifest["data"]) == (3, "größe")
    assert set(manifest["files"]) == {"params/d/0", "params/d/1", "opt_state/x", "top", "empty"}
    # sha256sum of nothing.
    assert manifest["files"]["empty"] == {
        "bytes": 0,
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["manifest.json"]
    verify(tmp_path, PARTS)


def test_a_manifest_is_json_but_for_its_last_line(tmp_path):
    make_checkpoint(tmp_path)
    write_manifest(tmp_path, {"step": 3})
    body, digest = (tmp_path / "manifest.json").read_text().rstrip("\n").rsplit("\n", 1)
    assert json.loads(body)["step"] == 3
    assert len(digest) == 64


def test_only_the_parts_asked_for_are_checked_and_what_belongs_to_none(tmp_path):
    make_checkpoint(tmp_path)
    write_manifest(tmp_path, {})
    (tmp_path / "opt_state" / "x").write_text("changed")
    verify(tmp_path, ["params"])
    with pytest.raises(DamagedError, match=r"opt_state/x has 7 bytes, not 22"):
        verify(tmp_path, PARTS)
    (tmp_path / "top").write_text("content of tap")
    with pytest.raises(DamagedError, match="top has changed"):
        verify(tmp_path, ["params"])
    (tmp_path / "top").unlink()
    with pytest.raises(DamagedError, match="top is missing"):
        verify(tmp_path, ["params"])


def test_files_put_beside_later_do_no_harm(tmp_path):
    """A .DS_Store, a .nfs file."""
    make_checkpoint(tmp_path)
    write_manifest(tmp_path, {})
    (tmp_path / "params" / ".DS_Store").write_text("")
    verify(tmp_path, PARTS)


def test_a_file_that_cannot_be_read_is_never_written_down_as_good(tmp_path, monkeypatch):
    make_checkpoint(tmp_path)
    unreadable = tmp_path / "params" / "d" / "1"
    path_open = Path.open

    def fail(self, *args, **kwargs):
        if self == unreadable:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return path_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_manifest(tmp_path, {})
    assert not (tmp_path / "manifest.json").exists()
