"""What a run shows where the output is no terminal: plain lines, one every so many steps."""

import dataclasses

import pytest

from gpt2_jax.training.progress import ProgressDisplay, _duration
from gpt2_jax.training.settings import DataSettings, TrainSettings


@pytest.fixture
def settings():
    return TrainSettings(
        run_dir="runs/test",
        steps=100,
        data=DataSettings(sequence_length=10, batch_size=50, micro_batch_size=50),
        log_every=10,
    )


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_a_line_has_all_that_the_user_wants_to_see(settings, capsys):
    with ProgressDisplay(settings, lambda speed: speed / 10_000) as display:
        for step in range(11):
            display.step(step, 3.25, 6e-4, 1.5, 0.25)
    # 500 tokens in 0.25 s, 89 steps to go.
    assert lines(capsys) == [
        "step 0/100  loss 3.2500  lr 6.00e-04  norm 1.500",
        "step 10/100  loss 3.2500  lr 6.00e-04  norm 1.500  2,000 tokens/s  MFU 20.0%  ETA 00:22",
    ]


def test_mfu_is_not_available_where_the_device_is_not_known(settings, capsys):
    with ProgressDisplay(settings) as display:
        for step in range(11):
            display.step(step, 3.25, 6e-4, 1.5, 0.25)
    assert "tokens/s  MFU n/a  ETA" in lines(capsys)[-1]


def test_the_first_step_warms_up_and_does_not_count(settings, capsys):
    with ProgressDisplay(dataclasses.replace(settings, log_every=1)) as display:
        display.step(0, 3.0, 6e-4, 1.5, 1000.0)
        display.step(1, 3.0, 6e-4, 1.5, 0.5)
    first, second = lines(capsys)
    assert "tokens/s" not in first
    assert "1,000 tokens/s" in second


def test_a_slow_step_moves_the_rate_only_a_little(settings, capsys):
    with ProgressDisplay(dataclasses.replace(settings, log_every=1)) as display:
        for step, seconds in enumerate([9.0, 1.0, 1.0, 11.0]):
            display.step(step, 3.0, 6e-4, 1.5, seconds)
    # 1 + 0.1 x (11 - 1) = 2 seconds a step.
    assert "250 tokens/s" in lines(capsys)[-1]


def test_a_resumed_run_shows_its_own_steps_and_the_last_one(settings, capsys):
    with ProgressDisplay(settings, first=88) as display:
        for step in range(88, 100):
            display.step(step, 3.25, 6e-4, 1.5, 60.0)
    shown = lines(capsys)
    assert [line.split("  ")[0] for line in shown] == ["step 90/100", "step 99/100"]
    assert "ETA 09:00" in shown[0]
    assert "ETA 00:00" in shown[1]


def test_measurements_and_texts_are_lines_of_their_own(settings, capsys):
    with ProgressDisplay(settings) as display:
        display.evaluation(50, {"val_loss": 3.14159})
        display.evaluation(50, {"hellaswag_acc": 0.25})
        display.evaluation(50, {"samples": ["[red]Hello[/red]\n\nyou", "x" * 500]})
    assert lines(capsys) == [
        "step 50  validation loss 3.1416",
        "step 50  hellaswag_acc 0.2500",
        r"step 50  sample: '[red]Hello[/red]\n\nyou'",
        f"step 50  sample: {'x' * 500!r}",
    ]


def test_a_quiet_display_shows_nothing(settings, capsys):
    with ProgressDisplay(settings, quiet=True) as display:
        display.step(0, 3.25, 6e-4, 1.5, 0.25)
        display.evaluation(0, {"val_loss": 3.0})
        display.say("hello")
    assert capsys.readouterr() == ("", "")


def test_values_that_are_no_numbers_are_shown_as_they_are(settings, capsys):
    with ProgressDisplay(settings) as display:
        display.step(0, float("nan"), 0.0, float("inf"), 0.25)
    assert lines(capsys) == ["step 0/100  loss nan  lr 0.00e+00  norm inf"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "00:00"),
        (59.9, "00:59"),
        (60, "01:00"),
        (3599, "59:59"),
        (3600, "01:00:00"),
        (86_399, "23:59:59"),
        (86_400, "1d 00:00:00"),
        (86_461, "1d 00:01:01"),
        (400 * 86_400 + 7200, "400d 02:00:00"),
    ],
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert _duration(seconds) == text
