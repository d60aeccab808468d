"""metrics.jsonl: whatever moment a process dies at, the records before it can be read."""

import math
import subprocess
import sys

import pytest

from gpt2_jax.errors import UserError
from gpt2_jax.training.metrics import (
    MetricsLog,
    read_metrics,
    records_until,
    rewrite,
)
from gpt2_jax.training.plot import plot_losses

# As a run writes them: measured after `step` updates, then the update to step + 1.
RECORDS = [
    {"step": 0, "val_loss": 4.5},
    {"step": 0, "samples": ["größe\n\u2028\x1f", "语言"]},
    {"step": 0, "loss": 4.6, "grad_norm": 1.5, "skipped": 0},
    {"step": 1, "loss": None, "grad_norm": None, "skipped": 1},
    {"step": 2, "val_loss": 4.4},
    {"step": 2, "hellaswag_acc": 0.25},
    {"step": 2, "loss": 4.3, "grad_norm": 1e-30, "skipped": 1},
    {"step": 3, "val_loss": 4.25},
]


def test_records_come_back_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for number, record in enumerate(RECORDS):
        log.write(record)
        assert read_metrics(path) == RECORDS[: number + 1]  # at once, not when it is closed
    log.sync()
    log.close()
    log = MetricsLog(path)
    log.write({"step": 9})
    log.close()
    assert read_metrics(path) == [*RECORDS, {"step": 9}]


def test_a_killed_process_loses_no_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, sys; from pathlib import Path\n"
        "from gpt2_jax.training.metrics import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]))\n"
        "for step in range(5): log.write({'step': step})\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == -9
    assert read_metrics(path) == [{"step": step} for step in range(5)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_record_holds_what_json_cannot(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    with pytest.raises(ValueError, match="JSON"):
        log.write({"step": 1, "loss": value})
    log.write({"step": 2})
    log.close()
    assert read_metrics(path) == [{"step": 2}]


def test_a_last_line_cut_anywhere_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rewrite(path, RECORDS)
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read_metrics(path) == RECORDS[: sum(end <= length for end in ends)]


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"3", b"null", b"[1]", b'"text"', b'{"loss": 3}', b"\0" * 30],
)
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a record"):
        read_metrics(path)
    path.write_bytes(b'{"step": 0}\n' + line + b"\n")
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)


@pytest.mark.parametrize("line", [b'{"step": "0"}', b'{"step": null}', b'{"step": [2]}'])
def test_a_step_that_is_no_number_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 1}\n')
    with pytest.raises(UserError, match="line 2"):
        records_until(path, 1)


def test_a_byte_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step\xff": 1}\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


@pytest.mark.parametrize(("step", "count"), [(0, 2), (1, 3), (2, 6), (3, 8), (4, 8)])
def test_a_checkpoint_comes_after_its_measurements_and_before_its_step(tmp_path, step, count):
    """The checkpoint of `step` was saved between the two kinds of records of that step."""
    path = tmp_path / "metrics.jsonl"
    rewrite(path, RECORDS)
    assert records_until(path, step) == RECORDS[:count]


def test_a_resumed_run_has_neither_gaps_nor_repeats(tmp_path):
    """Killed anywhere after checkpoint 2, then continued: the file of an undisturbed run."""
    path = tmp_path / "metrics.jsonl"
    for written in range(6, len(RECORDS) + 1):
        rewrite(path, RECORDS[:written])
        with path.open("a") as file:
            file.write('{"step": 9, "lo')
        kept = records_until(path, 2)
        rewrite(path, kept)
        log = MetricsLog(path)
        for record in RECORDS[len(kept) :]:
            log.write(record)
        log.close()
        assert read_metrics(path) == RECORDS


def test_without_a_file_there_are_no_records(tmp_path):
    assert records_until(tmp_path / "metrics.jsonl", 5) == []
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_rewriting_leaves_the_old_file_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    rewrite(path, RECORDS)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rewrite(path, [])
    assert read_metrics(path) == RECORDS
    rewrite(path, [])
    assert read_metrics(path) == []
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "records",
    [RECORDS, RECORDS[:1], RECORDS[3:4], []],
    ids=["a run", "a single value", "a skipped step", "nothing yet"],
)
@pytest.mark.parametrize("reference", [None, 3.29])
def test_a_picture_is_drawn_of_whatever_there_is(tmp_path, records, reference):
    path = tmp_path / "loss.png"
    plot_losses(records, path, "demo: 1,234 parameters", reference)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_the_name_of_a_run_is_no_formula(tmp_path):
    plot_losses(RECORDS, tmp_path / "loss.png", r"$lr_{1 $^ run: 1 parameter")
    assert (tmp_path / "loss.png").exists()
