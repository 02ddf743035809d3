"""Entry point for tools that do not read pyproject.toml, which holds all metadata."""

from setuptools import setup

setup()
