"""Scripts as their users start them, in the process of the test."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


class Door:
    """Runs scripts in this process, as `python scripts/NAME.py FLAGS` would."""

    def __init__(self, capsys: pytest.CaptureFixture) -> None:
        self._capsys = capsys

    def __call__(self, name: str, *flags: object) -> tuple[int, str, str]:
        """Returns exit status, stdout and stderr."""
        script = SCRIPTS / f"{name}.py"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(script), *map(str, flags)])
            with pytest.raises(SystemExit) as stop:
                runpy.run_path(str(script), run_name="__main__")
        assert isinstance(stop.value.code, int)
        out, err = self._capsys.readouterr()
        return stop.value.code, out, err

    def refuses(self, name: str, *flags: object) -> str:
        """Expects exit status 2, silence on stdout and one line on stderr; returns the line."""
        code, out, err = self(name, *flags)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err
