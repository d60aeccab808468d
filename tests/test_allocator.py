"""Training scripts start again with an allocator that keeps memory."""

import json
import os
import runpy
import subprocess
import sys

import pytest

from gpt2_jax.allocator import KEEP_MEMORY, VARIABLE

PROGRAM = """\
import json, os, sys
from gpt2_jax.allocator import restart_keeping_memory
print(os.getpid(), flush=True)
restart_keeping_memory()
print(json.dumps([os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv, sys.flags.optimize]))
"""


def lines(tmp_path, **environment):
    script = tmp_path / "a script.py"
    script.write_text(PROGRAM)
    inherited = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-O", str(script), "--flag", "a b", ""],
        env={**inherited, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    *starts, last = done.stdout.splitlines()
    return [int(start) for start in starts], *json.loads(last)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_the_program_starts_again_once_as_the_same_process_with_the_same_arguments(tmp_path):
    starts, process, variable, arguments, optimize = lines(tmp_path)
    assert starts == [process, process]
    assert variable == KEEP_MEMORY
    assert arguments[1:] == ["--flag", "a b", ""]
    assert optimize == 1


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_a_program_that_runs_a_script_is_not_started_again(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from gpt2_jax.allocator import *\nrestart_keeping_memory()\ndone = 1\n")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert runpy.run_path(str(script), run_name="__main__")["done"] == 1
    assert VARIABLE not in os.environ


@pytest.mark.parametrize("theirs", ["", "glibc.malloc.check=0"])
def test_who_has_set_the_variable_keeps_it(tmp_path, theirs):
    starts, process, variable, *_ = lines(tmp_path, **{VARIABLE: theirs})
    assert starts == [process]
    assert variable == theirs
