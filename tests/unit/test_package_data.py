"""What an installed package has: all files that the code reads, not the code alone."""

from __future__ import annotations

import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2]


def test_every_file_beside_the_code_is_installed() -> None:
    package = PROJECT / "parafuse"
    patterns = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["parafuse"]
    installed = {file for pattern in patterns for file in package.glob(pattern)}
    there = {file for file in package.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert there, "control: there are some"
    assert {str(file.relative_to(package)) for file in there - installed} == set()
