"""The programs of examples/integrations run, each in the words of its docstring."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "integrations"
NEEDS = {"vit_critic": "timm", "maml": "torch", "hessian_vector": "transformers", "diffusion_r1": "diffusers"}


def test_every_example_is_in_the_table() -> None:
    assert {file.stem for file in FOLDER.glob("*.py")} == NEEDS.keys()


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(NEEDS[name], reason="needs the extra: pip install fastgan[integrations]")
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "step" in printed and "nan" not in printed
