"""Ctrl-C at any moment of a command ends in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastgan.cli.main import command

IMPORTING = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
for _ in range(10**6):
    pass
raise SystemExit("not interrupted")
"""
PROGRAM = """
import sys
from fastgan.cli.main import command

@command
def main(argv):
    import torch

sys.exit(main([]))
"""


def test_an_interrupt_that_an_import_turns_into_another_error(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("Error calling __set_name__") from error

    assert main([]) == 130
    assert capsys.readouterr().err == "fastgan: interrupted\n"


def test_other_errors_stay(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: list[str]) -> int:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        main([])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_torch_is_imported(tmp_path: Path) -> None:
    """KeyboardInterrupt in its C++ parts would abort the process."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(IMPORTING)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "fastgan: interrupted\n")
