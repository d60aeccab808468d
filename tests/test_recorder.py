"""The recorder: a step's values are read when the next has been dispatched, and none is lost."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.errors import UserError
from gpt2_jax.training import recorder as recorder_module
from gpt2_jax.training import stopwatch as stopwatch_module
from gpt2_jax.training.engine import make_engine
from gpt2_jax.training.mesh import make_layout
from gpt2_jax.training.metrics import MetricsLog, read_metrics, rewrite
from gpt2_jax.training.outputs import Outputs
from gpt2_jax.training.progress import ProgressDisplay
from gpt2_jax.training.recorder import Recorder, open_recorder
from gpt2_jax.training.settings import (
    DataSettings,
    MeshSettings,
    OptimizerSettings,
    TrainSettings,
)
from gpt2_jax.training.step import StepMetrics
from gpt2_jax.training.stopwatch import Stopwatch
from gpt2_jax.training.trackers import Tracker


@pytest.fixture
def settings(shallow_config, tmp_path):
    return TrainSettings(
        run_dir=str(tmp_path),
        steps=9,
        model=shallow_config,
        data=DataSettings(sequence_length=8, batch_size=4, micro_batch_size=2),
        optimizer=OptimizerSettings(max_skipped_steps=3, warmup_steps=2),
        mesh=MeshSettings(data=1),
        log_every=1,
        dtype="float32",
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


@contextlib.contextmanager
def recording(settings, path, **options):
    """A recorder whose schedule gives step i the learning rate i."""
    with Outputs(path) as outputs, ProgressDisplay(settings) as display:
        yield Recorder(settings, outputs, display, lambda step: step, **options)


@pytest.fixture
def recorder(settings, path):
    with recording(settings, path) as recorder:
        yield recorder


def metrics(loss, norm=1.0, skipped=0, in_a_row=0):
    return StepMetrics(
        jnp.asarray(loss, jnp.float32),
        jnp.asarray(norm, jnp.float32),
        jnp.asarray(skipped, jnp.int32),
        jnp.asarray(in_a_row, jnp.int32),
    )


def test_a_steps_values_are_read_one_step_late(recorder, path):
    for step in range(3):
        recorder.push(step, metrics(step))
        assert [record["loss"] for record in read_metrics(path)] == list(range(step))
    recorder.flush()
    recorder.flush()
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2]


def test_what_was_not_pushed_yet_is_never_waited_for(recorder, monkeypatch):
    """Only the values of the step before are taken from the device."""
    taken = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: taken.append(tree) or device_get(tree))
    first, second = metrics(1), metrics(2)
    recorder.push(0, first)
    assert taken == []
    recorder.push(1, second)
    assert len(taken) == 1
    assert taken[0] is first


def test_a_record_has_all_that_a_step_reports(recorder, path):
    recorder.push(0, metrics(3.25, 1.5))
    recorder.flush()
    (record,) = read_metrics(path)
    speed = record.pop("tokens_per_second")
    assert record == {"step": 0, "loss": 3.25, "grad_norm": 1.5, "learning_rate": 0, "skipped": 0}
    assert 0 < speed < math.inf


def test_measurements_stand_between_the_steps_they_came_between(recorder, path):
    recorder.push(0, metrics(4))
    recorder.push(1, {"val_loss": jnp.asarray(3.5)})
    assert recorder.val_losses == {}
    recorder.push(1, {"samples": ["a", "größe"]})
    assert recorder.val_losses == {1: 3.5}
    recorder.push(1, {"hellaswag_acc": np.float32(0.25), "hellaswag_acc_norm": 1})
    recorder.push(1, metrics(3))
    recorder.sync()
    records = read_metrics(path)
    assert [(r["step"], *(set(r) & {"loss", "val_loss", "samples"})) for r in records] == [
        (0, "loss"),
        (1, "val_loss"),
        (1, "samples"),
        (1,),
        (1, "loss"),
    ]
    assert records[2]["samples"] == ["a", "größe"]
    assert records[3] == {"step": 1, "hellaswag_acc": 0.25, "hellaswag_acc_norm": 1.0}


def test_a_skipped_step_leaves_the_schedule_where_it_was(recorder, path, capsys):
    """Steps 1, 2 and 4 of six are skipped: the third update is step 5's."""
    skipped = [0, 1, 2, 2, 3, 3]
    in_a_row = [0, 1, 2, 0, 1, 0]
    for step in range(6):
        bad = in_a_row[step] > 0
        loss, norm = (math.nan, math.inf) if bad else (1.0, 1.0)
        recorder.push(step, metrics(loss, norm, skipped[step], in_a_row[step]))
    recorder.flush()
    records = read_metrics(path)
    assert [record["learning_rate"] for record in records] == [0, 1, 1, 1, 2, 2]
    assert [record["skipped"] for record in records] == skipped
    assert [record["loss"] for record in records] == [1.0, None, None, 1.0, None, 1.0]
    assert [record["grad_norm"] for record in records] == [1.0, None, None, 1.0, None, 1.0]
    said = [line for line in capsys.readouterr().out.splitlines() if "update skipped" in line]
    assert [line.split()[1] for line in said] == ["1", "2", "4"]


def test_a_loss_may_be_finite_where_the_gradient_is_not(recorder, path):
    recorder.push(0, metrics(2.5, math.nan, 1, 1))
    recorder.flush()
    (record,) = read_metrics(path)
    assert (record["loss"], record["grad_norm"]) == (2.5, None)


def test_a_resumed_run_goes_on_counting_skipped_steps(settings, path):
    with recording(settings, path, skipped=2) as recorder:
        recorder.push(7, metrics(1.0, skipped=2))
        recorder.push(8, metrics(1.0, skipped=3, in_a_row=1))
        recorder.flush()
    assert [r["learning_rate"] for r in read_metrics(path)] == [5, 6]


def test_too_many_skipped_steps_in_a_row_stop_the_run(recorder, path):
    for step, row in enumerate([1, 2, 0, 1, 2]):
        recorder.push(step, metrics(math.nan, math.nan, step + 1, row))
    recorder.push(5, metrics(math.nan, math.nan, 6, 3))
    with pytest.raises(UserError, match=r"step 5: .*3 steps in a row.*learning_rate"):
        recorder.flush()
    assert len(read_metrics(path)) == 6  # the last one is on record too


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["val_loss", "hellaswag_acc"])
def test_a_measurement_that_is_no_number_says_the_run_diverged(recorder, path, name, value):
    recorder.push(5, {"fine": 1.0, name: jnp.asarray(value)})
    with pytest.raises(UserError, match=rf"step 5: {name} is .*diverged"):
        recorder.flush()
    assert read_metrics(path) == []
    assert recorder.val_losses == {}
    recorder.flush()  # told once


def test_has_tells_what_a_resumed_run_measured_before(settings, path):
    earlier = [
        {"step": 4, "val_loss": 3.0},
        {"step": 4, "loss": 2.0},
        {"step": 6, "samples": ["a"]},
    ]
    with recording(settings, path, earlier=earlier) as recorder:
        assert recorder.val_losses == {4: 3.0}
        known = {(s, n) for s in range(9) for n in ("val_loss", "samples") if recorder.has(s, n)}
    assert known == {(4, "val_loss"), (6, "samples")}


def test_all_is_on_disk_before_a_checkpoint(settings, path, monkeypatch):
    """Or a resumed run would have a gap in its records."""
    synced = []
    monkeypatch.setattr(
        recorder_module.Outputs, "sync", lambda _: synced.append(read_metrics(path))
    )
    with recording(settings, path) as recorder:
        recorder.push(0, metrics(1.0))
        recorder.sync()
    assert [[record["step"] for record in records] for records in synced] == [[0]]


def test_the_end_is_told_with_its_reason(recorder, path, capsys):
    recorder.push(3, metrics(1.0))
    recorder.finish("stopped by SIGTERM after 4 steps; the same command goes on from there")
    said = capsys.readouterr().out
    assert "stopped by SIGTERM after 4 steps; the same command goes on" in said
    assert said.splitlines()[-1].startswith("time ")
    assert [record["step"] for record in read_metrics(path)] == [3]
    recorder.finish(None)
    assert "stopped" not in capsys.readouterr().out


# Opening it for a run


def test_a_resumed_run_drops_the_records_that_will_come_again(settings, path, capsys):
    engine = make_engine(settings, make_layout(settings))
    rewrite(path, [{"step": s, "loss": 1.0} for s in range(7)] + [{"step": 7, "val_loss": 2.0}])
    with path.open("a") as file:
        file.write('{"step": 7, "lo')
    opt_state = {"total_notfinite": np.int32(2)}
    with open_recorder(settings, engine, 5, opt_state) as recorder:
        assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3, 4]
        recorder.push(5, metrics(1.0, skipped=2))
    # The schedule stands where 5 - 2 updates left it.
    with open_recorder(settings, engine, 5, opt_state) as recorder:
        recorder.push(5, metrics(1.0, skipped=2))
        recorder.flush()
    last = read_metrics(path)[-1]
    assert last["learning_rate"] == pytest.approx(float(engine.schedule(3)), rel=1e-6)
    said = capsys.readouterr().out
    assert "resuming after step 5" in said
    assert "32 tokens a step = 2 sequences x 8 tokens x 1 device(s) x 2 pass(es)" in said


def test_trackers_are_told_again_what_they_drop_on_a_resume(settings, path, monkeypatch):
    """TensorBoard is told to forget step 5 and all after it; what was measured there is kept."""
    told = []
    tracker = Tracker(lambda step, numbers, texts: told.append((step, numbers, texts)), bool)
    monkeypatch.setattr(recorder_module, "open_trackers", lambda *_: [tracker])
    rewrite(path, [{"step": 4, "loss": 1.0}, {"step": 5, "val_loss": 2.0}, {"step": 5, "loss": 1}])
    engine = make_engine(settings, make_layout(settings))
    with open_recorder(settings, engine, 5, {}) as recorder:
        assert recorder.has(5, "val_loss")
    assert told == [(5, {"val_loss": 2.0}, {})]
    assert read_metrics(path) == [{"step": 4, "loss": 1.0}, {"step": 5, "val_loss": 2.0}]


def test_only_the_first_process_writes_and_speaks(settings, path, capsys, monkeypatch):
    monkeypatch.setattr(recorder_module, "is_primary", lambda: False)
    rewrite(path, [{"step": 0, "val_loss": 3.0}])
    before = path.read_bytes()
    engine = make_engine(settings, make_layout(settings))
    with open_recorder(settings, engine, 0, {}) as recorder:
        assert recorder.has(0, "val_loss")  # or the processes would not measure the same
        recorder.push(0, metrics(1.0))
        recorder.sync()
        recorder.finish("stopped by SIGTERM after 1 steps")
    assert path.read_bytes() == before
    assert capsys.readouterr().out == ""


# Where records go


def test_records_go_everywhere_and_all_is_closed(path):
    seen, closed = [], []
    trackers = [
        Tracker(lambda *record, n=n: seen.append((n, *record)), lambda n=n: closed.append(n))
        for n in range(2)
    ]
    with Outputs(path, trackers) as outputs:
        outputs.write({"step": 1, "loss": 0.5})
    assert seen == [(0, 1, {"loss": 0.5}, {}), (1, 1, {"loss": 0.5}, {})]
    assert closed == [0, 1]
    with Outputs(None) as nowhere:
        nowhere.write({"step": 1})
        nowhere.sync()


def test_trackers_are_closed_although_the_disk_is_full(path, monkeypatch):
    closed = []

    def fail(log):
        log._file.close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsLog, "close", fail)
    with (
        pytest.raises(OSError, match="No space"),
        Outputs(path, [Tracker(print, lambda: closed.append(1))]),
    ):
        pass
    assert closed == [1]


# The stopwatch


@pytest.fixture
def clock(monkeypatch):
    """A clock that only goes when told to: clock(3.0) lets three seconds pass."""
    now = [100.0]

    def advance(seconds):
        now[0] += seconds

    monkeypatch.setattr(stopwatch_module.time, "perf_counter", lambda: now[0])
    return advance


def test_a_step_takes_the_time_between_two_results(clock):
    stopwatch = Stopwatch()
    clock(2.0)
    assert stopwatch.lap("step") == 2.0
    clock(3.0)
    assert stopwatch.lap("step") == 3.0
    assert stopwatch.seconds["step"] == 5.0


def test_blocks_are_taken_out_of_the_step_but_waiting_for_data_slows_it(clock):
    """Tokens per second are what a user gets: the wait for data counts, a checkpoint does not."""
    stopwatch = Stopwatch()
    clock(1.0)
    with stopwatch.block("compile"):
        clock(60.0)
    with stopwatch.block("data"):
        clock(4.0)
    clock(2.0)
    with stopwatch.block("checkpoint"):
        clock(8.0)
    assert stopwatch.lap("step") == 3.0 + 4.0
    assert stopwatch.seconds == {
        "compile": 60.0,
        "data": 4.0,
        "step": 3.0,
        "eval": 0.0,
        "checkpoint": 8.0,
    }
    clock(1.0)
    assert stopwatch.lap("step") == 1.0  # blocks count once


def test_the_parts_add_up_to_the_whole_time(clock):
    stopwatch = Stopwatch()
    for part in ("compile", "eval", "data", "data", "checkpoint"):
        clock(0.5)
        with stopwatch.block(part):
            clock(1.0)
        clock(0.25)
        stopwatch.lap("step")
    assert sum(stopwatch.seconds.values()) == 5 * 1.75
    assert stopwatch.report() == (
        "time 8.8 s: compile 1.0 s, data 2.0 s, step 3.8 s, eval 1.0 s, checkpoint 1.0 s; "
        "22.9% waiting for data"
    )


def _fail_after(clock, seconds):
    clock(seconds)
    raise UserError("no space left")


def test_a_block_that_fails_is_counted(clock):
    stopwatch = Stopwatch()
    with pytest.raises(UserError), stopwatch.block("checkpoint"):
        _fail_after(clock, 5.0)
    assert stopwatch.seconds["checkpoint"] == 5.0


@pytest.mark.usefixtures("clock")
def test_a_clock_that_stands_still_divides_nothing_by_zero():
    stopwatch = Stopwatch()
    assert stopwatch.lap("step") > 0
    assert "0.0% waiting" in Stopwatch().report()
