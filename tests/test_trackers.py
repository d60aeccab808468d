"""TensorBoard and Weights & Biases get what metrics.jsonl gets, under the same steps."""

import sys
import types

import pytest
from tensorboardX import proto

from gpt2_jax.errors import UserError
from gpt2_jax.training.config_files import from_json
from gpt2_jax.training.settings import TrainSettings
from gpt2_jax.training.trackers import Tracker, open_trackers

RECORDS = [
    {"step": 0, "val_loss": 4.5},
    {"step": 0, "loss": 4.25, "grad_norm": 1.5, "learning_rate": 1e-4, "skipped": 0},
    {"step": 1, "loss": None, "grad_norm": None, "learning_rate": 2e-4, "skipped": 1},
    {"step": 2, "samples": ["Hello, größe", "Hello,\nyou"]},
    {"step": 2, "hellaswag_acc": 0.25, "hellaswag_acc_norm": 0.5},
]


def settings(tmp_path, **fields):
    return TrainSettings(run_dir=str(tmp_path / "run"), steps=3, **fields)


def test_nothing_is_opened_that_nobody_asked_for(tmp_path):
    assert open_trackers(settings(tmp_path), tmp_path, 0) == []
    assert list(tmp_path.iterdir()) == []


def test_a_record_is_split_into_numbers_and_texts():
    seen = []
    tracker = Tracker(lambda *record: seen.append(record), lambda: None)
    for record in RECORDS:
        tracker.write(record)
    assert seen == [
        (0, {"val_loss": 4.5}, {}),
        (0, {"loss": 4.25, "grad_norm": 1.5, "learning_rate": 1e-4, "skipped": 0}, {}),
        (1, {"learning_rate": 2e-4, "skipped": 1}, {}),
        (2, {}, {"samples": "Hello, größe\n\nHello,\nyou"}),
        (2, {"hellaswag_acc": 0.25, "hellaswag_acc_norm": 0.5}, {}),
    ]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^--wandb needs .*pip install") as caught:
        open_trackers(settings(tmp_path, wandb="mine"), tmp_path, 0)
    assert "\n" not in str(caught.value)


# TensorBoard


def read_events(directory):
    """(step, name, number or text) of every event, and where a resumed run begins."""
    events, starts = [], []
    for file in sorted(directory.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = proto.event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]
            if event.HasField("session_log"):
                starts.append(event.step)
            for value in event.summary.value:
                text = value.tensor.string_val
                shown = text[0].decode() if text else round(value.simple_value, 6)
                events.append((event.step, value.tag.split("/")[0], shown))
    return events, starts


def test_tensorboard_gets_every_number_and_text(tmp_path):
    (tracker,) = open_trackers(settings(tmp_path, tensorboard=True), tmp_path, 0)
    for record in RECORDS:
        tracker.write(record)
    tracker.close()
    events, _ = read_events(tmp_path / "tensorboard")
    assert events == [
        (0, "val_loss", 4.5),
        (0, "loss", 4.25),
        (0, "grad_norm", 1.5),
        (0, "learning_rate", 1e-4),
        (0, "skipped", 0.0),
        (1, "learning_rate", 2e-4),
        (1, "skipped", 1.0),
        (2, "samples", "Hello, größe\n\nHello,\nyou"),
        (2, "hellaswag_acc", 0.25),
        (2, "hellaswag_acc_norm", 0.5),
    ]


def test_a_resumed_run_tells_tensorboard_where_it_goes_on(tmp_path):
    for first in (0, 2):
        (tracker,) = open_trackers(settings(tmp_path, tensorboard=True), tmp_path, first)
        tracker.write({"step": first, "loss": 1.0})
        tracker.close()
    _, starts = read_events(tmp_path / "tensorboard")
    assert sorted(starts)[-1] == 2


# Weights & Biases: no account and no network here, so a stand-in takes the calls.


class WandbError(Exception):
    pass


class Run:
    def __init__(self, options):
        self.options, self.logged, self.finished = options, [], 0

    def log(self, data, step=None):
        assert not self.finished
        self.logged.append((step, data))

    def finish(self, **_):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """A module whose runs can be looked at."""
    module = types.ModuleType("wandb")
    module.Error = WandbError
    module.runs = []

    def init(**options):
        module.runs.append(Run(options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def open_wandb(tmp_path, first=0):
    asked = settings(tmp_path, wandb="mine")
    (tracker,) = open_trackers(asked, tmp_path / "run", first)
    return tracker


def test_wandb_gets_every_number_and_text_under_its_step(tmp_path, wandb):
    tracker = open_wandb(tmp_path)
    for record in RECORDS:
        tracker.write(record)
    tracker.close()
    (run,) = wandb.runs
    assert run.logged == [
        (0, {"val_loss": 4.5}),
        (0, {"loss": 4.25, "grad_norm": 1.5, "learning_rate": 1e-4, "skipped": 0}),
        (1, {"learning_rate": 2e-4, "skipped": 1}),
        (2, {"samples": "Hello, größe\n\nHello,\nyou"}),
        (2, {"hellaswag_acc": 0.25, "hellaswag_acc_norm": 0.5}),
    ]
    assert run.finished == 1


def test_wandb_is_told_project_place_and_settings(tmp_path, wandb):
    open_wandb(tmp_path)
    options = wandb.runs[0].options
    assert (options["project"], options["name"]) == ("mine", "run")
    assert options["dir"] == str(tmp_path / "run")
    stored = from_json(options["config"]["config.json"], "config.json")
    assert stored == settings(tmp_path, wandb="mine")


def test_a_resumed_run_is_the_same_run_at_wandb(tmp_path, wandb):
    open_wandb(tmp_path)
    open_wandb(tmp_path, first=2)
    open_wandb(tmp_path / "elsewhere")
    first, again, other = (run.options for run in wandb.runs)
    assert first["id"] == again["id"] != other["id"]
    assert first["resume"] == "allow"


@pytest.mark.parametrize("name", ["lr=3e-4:x", "a/b#c", "50%", "what?", "n" * 200])
def test_whatever_a_run_is_called_wandb_takes_its_id(tmp_path, wandb, name):
    """docs.wandb.ai, wandb.init: a run's id has none of these characters, and is 128 at most."""
    asked = settings(tmp_path, wandb="mine")
    open_trackers(asked, tmp_path / name, 0)
    run_id = wandb.runs[0].options["id"]
    assert 0 < len(run_id) <= 128
    assert not set(run_id) & set("/\\#?%:")


def test_what_wandb_refuses_is_one_line(tmp_path, wandb):
    def refuse(**_):
        raise WandbError("api_key not configured")

    wandb.init = refuse
    with pytest.raises(UserError, match=r"--wandb mine: api_key not configured; .*wandb login"):
        open_wandb(tmp_path)
