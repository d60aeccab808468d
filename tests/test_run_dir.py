"""The run directory: what may be resumed, replaced or started, and that one process at a time
trains in it."""

import dataclasses
import subprocess
import sys

import pytest

from gpt2_jax.errors import UserError
from gpt2_jax.training.config_files import from_json, to_json
from gpt2_jax.training.run_dir import check_run, clear, locked, store_settings
from gpt2_jax.training.settings import DataSettings, TrainSettings

NAMES = [
    "config.json",
    "metrics.jsonl",
    "loss.png",
    "checkpoints",
    "damaged",
    "tensorboard",
    "profile",
]


@pytest.fixture
def settings(tmp_path):
    return TrainSettings(run_dir=str(tmp_path / "run"), steps=3)


def check(settings, *, resume=False, overwrite=False, allow_changes=False):
    return check_run(settings, resume=resume, overwrite=overwrite, allow_changes=allow_changes)


def store(settings, tmp_path, content="the same"):
    """What there may be before."""
    run_dir = tmp_path / "run"
    if content == "nothing":
        return
    run_dir.mkdir()
    if content == "other files":
        (run_dir / "notes.txt").write_text("mine")
    elif content == "remains":
        (run_dir / "checkpoints").mkdir()
    elif content == "broken":
        (run_dir / "config.json").write_text(to_json(settings)[:40])
    elif content == "a model":
        (run_dir / "config.json").write_text('{"model_type": "gpt2"}')
    else:
        changes = {
            "the same": {},
            "moved": {"data": DataSettings(path="elsewhere"), "log_every": 77},
            "other": {"steps": 4, "seed": 5},
        }
        before = dataclasses.replace(settings, **changes[content])
        (run_dir / "config.json").write_text(to_json(before))


# Per content: the answer, or the error, with no flag, --resume, --overwrite, --allow_changes.
DECISIONS = {
    "nothing": (False, "holds no run", False, False),
    "empty": (False, "holds no run", False, False),
    "other files": (False, "holds no run", False, False),
    "remains": ("checkpoints without the config", "holds no run", False, "without the config"),
    "broken": ("not the config", "not the config", False, "not the config"),
    "a model": ("not the config", "not the config", "leaves .* alone", "not the config"),
    "the same": (True, True, False, True),
    "moved": (True, True, False, True),
    "other": ("other settings", "other settings", False, True),
}
FLAGS = [{}, {"resume": True}, {"overwrite": True}, {"allow_changes": True}]


@pytest.mark.parametrize("flags", FLAGS, ids=["none", "resume", "overwrite", "allow_changes"])
@pytest.mark.parametrize("content", DECISIONS)
def test_what_becomes_of_a_run_directory(settings, tmp_path, content, flags):
    if content == "empty":
        (tmp_path / "run").mkdir()
    else:
        store(settings, tmp_path, content)
    before = sorted(tmp_path.rglob("*"))
    wanted = DECISIONS[content][FLAGS.index(flags)]
    if isinstance(wanted, bool):
        assert check(settings, **flags) is wanted
    else:
        with pytest.raises(UserError, match=wanted) as caught:
            check(settings, **flags)
        assert str(tmp_path / "run") in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_resume_and_overwrite_exclude_each_other(settings):
    with pytest.raises(UserError, match="exclude each other"):
        check(settings, resume=True, overwrite=True)


def test_other_settings_are_listed_with_the_ways_out(settings, tmp_path):
    store(settings, tmp_path, "other")
    with pytest.raises(UserError) as caught:
        check(settings)
    message = str(caught.value)
    assert "steps was 4, now 3, seed was 5, now 1337" in message
    for flag in ("--run_dir", "--allow_changes", "--overwrite"):
        assert flag in message


def test_settings_that_may_change_do_not_hide_those_that_may_not(settings, tmp_path):
    store(settings, tmp_path, "moved")
    changed = dataclasses.replace(settings, seed=6)
    with pytest.raises(UserError) as caught:
        check(changed)
    assert "seed was 1337, now 6" in str(caught.value)
    assert "log_every" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [("the same", ""), ("moved", "data.path was 'elsewhere', now"), ("other", "steps was 4")],
)
def test_changes_are_told_on_stderr(settings, tmp_path, capsys, content, told):
    store(settings, tmp_path, content)
    assert check(settings, allow_changes=True)
    streams = capsys.readouterr()
    assert streams.out == ""
    assert told in streams.err
    assert len(streams.err.splitlines()) == (1 if told else 0)


def test_a_config_that_cannot_be_read_is_named(settings, tmp_path):
    store(settings, tmp_path)
    (tmp_path / "run" / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"config\.json is not UTF-8"):
        check(settings)


LOCK = """
import sys
from pathlib import Path
from gpt2_jax.errors import UserError
from gpt2_jax.training.run_dir import locked
try:
    with locked(Path(sys.argv[1])):
        print("locked", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error)
"""


@pytest.fixture
def other_process(tmp_path):
    """Another process that holds the directory until it is killed."""
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "locked\n"
        yield holder
        holder.kill()


def test_no_second_process_trains_in_a_directory(tmp_path, other_process):
    with (
        pytest.raises(UserError, match=r"another process is training in .*run; wait"),
        locked(tmp_path / "run"),
    ):
        pass
    # Another directory is free meanwhile, and this one when the process is gone, even killed.
    with locked(tmp_path / "other"):
        pass
    other_process.kill()
    other_process.wait()
    with locked(tmp_path / "run"):
        pass


@pytest.mark.slow
def test_a_lock_keeps_others_out_and_is_given_back(tmp_path):
    command = [sys.executable, "-c", LOCK, str(tmp_path / "a" / "run")]

    def try_it():
        return subprocess.run(command, input="", capture_output=True, text=True, check=True).stdout

    with locked(tmp_path / "a" / "run"):
        assert "another process is training" in try_it()
    assert try_it() == "locked\n"
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "run"):
        raise ZeroDivisionError
    assert try_it() == "locked\n"
    assert list((tmp_path / "a" / "run").iterdir()) == []


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(UserError, match=f"cannot write run directory {run_dir}: .*--run_dir"),
            locked(run_dir),
        ):
            pass


def make_run(run_dir):
    for name in NAMES:
        if "." in name:
            (run_dir / name).write_text("x")
        else:
            (run_dir / name / "deep" / "er").mkdir(parents=True)
            (run_dir / name / "deep" / "file").write_text("x")


def test_clearing_removes_what_a_run_writes_and_nothing_else(tmp_path):
    make_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "config.json").write_text("mine")
    clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "notes.txt"]
    assert (tmp_path / "data" / "config.json").read_text() == "mine"
    clear(tmp_path)


def test_checkpoints_on_another_disk_may_be_replaced_too(tmp_path):
    """A link to a larger disk, as clusters have it."""
    disk = tmp_path / "disk"
    (disk / "17").mkdir(parents=True)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(disk)
    clear(run_dir)
    assert not (run_dir / "checkpoints" / "17").exists()


def test_settings_are_stored_whole_or_not_at_all(settings, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    store_settings(settings)
    assert from_json((run_dir / "config.json").read_text(), "config.json") == settings
    changed = dataclasses.replace(settings, seed=6)
    store_settings(changed)
    assert from_json((run_dir / "config.json").read_text(), "config.json") == changed
    assert [path.name for path in run_dir.iterdir()] == ["config.json"]

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(UserError, match=f"{run_dir}: No space left on device"):
        store_settings(settings)
    assert from_json((run_dir / "config.json").read_text(), "config.json") == changed
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot write run directory"):
        store_settings(dataclasses.replace(settings, run_dir=str(tmp_path / "gone")))
