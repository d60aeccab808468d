"""SIGTERM and SIGINT: the first asks the run to stop between two steps, the second stops it."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from gpt2_jax.training.mesh import make_mesh
from gpt2_jax.training.settings import MeshSettings
from gpt2_jax.training.stopping import StopRequest

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture
def request_to_stop():
    return StopRequest(make_mesh(MeshSettings(data=1)))


def test_without_a_signal_nobody_stops(request_to_stop):
    with request_to_stop as stop:
        assert not stop.agreed()
        assert stop.signal is None


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_only_asks(request_to_stop, number):
    with request_to_stop as stop:
        os.kill(os.getpid(), number)
        assert stop.agreed()
        assert stop.agreed()
        assert stop.signal == number.name


@pytest.mark.parametrize("number", SIGNALS)
def test_after_the_first_the_system_itself_handles_the_next(request_to_stop, number):
    """No Python is needed then: a long step, or a hang, cannot hold it up."""
    with request_to_stop:
        os.kill(os.getpid(), number)
        assert [signal.getsignal(other) for other in SIGNALS] == [signal.SIG_DFL] * 2


@pytest.mark.parametrize("raised", [False, True])
def test_handlers_are_given_back(request_to_stop, raised):
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with request_to_stop:
            assert [signal.getsignal(number) for number in SIGNALS] != before
            if raised:
                os.kill(os.getpid(), signal.SIGTERM)
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_run_in_another_thread_leaves_signals_alone(request_to_stop):
    """As in a notebook's worker; only the main thread may handle signals."""
    before = [signal.getsignal(number) for number in SIGNALS]
    inside = []

    def run():
        with request_to_stop as stop:
            inside.append((stop.agreed(), [signal.getsignal(number) for number in SIGNALS]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert inside == [(False, before)]
    assert [signal.getsignal(number) for number in SIGNALS] == before


# Says what it does, line by line, and waits for a line in between: no clock decides the order.
CHILD = """
import signal, sys
from gpt2_jax.training.mesh import make_mesh
from gpt2_jax.training.settings import MeshSettings
from gpt2_jax.training.stopping import StopRequest

with StopRequest(make_mesh(MeshSettings(data=1))) as stop:
    print("ready", flush=True)
    while not stop.agreed():
        signal.sigtimedwait([signal.SIGUSR1], 0.01)
    print("asked", stop.signal, flush=True)
    sys.stdin.readline()
print("left", flush=True)
"""


@pytest.fixture
def child():
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_asked_once_leaves_in_its_own_time(child, number):
    child.send_signal(number)
    assert child.stdout.readline() == f"asked {number.name}\n"
    out, err = child.communicate("go on\n")
    assert (child.returncode, out, err) == (0, "left\n", "")


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(child, first, second):
    child.send_signal(first)
    assert child.stdout.readline() == f"asked {first.name}\n"
    child.send_signal(second)
    out, err = child.communicate()
    # Killed by the signal: no traceback, no farewell, and the parent can tell.
    assert (child.returncode, out, err) == (-second, "", "")
