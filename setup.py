"""Everything is declared in pyproject.toml; this file is where the compiled extension of csrc/ is built from."""

from setuptools import setup

setup()
