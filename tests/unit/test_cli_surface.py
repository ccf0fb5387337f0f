"""The command line's surface is frozen: cli_surface.txt changes only with a decision to change it.

After such a decision: python -m tests.unit.test_cli_surface > tests/unit/cli_surface.txt"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer.main

from parafuse.launch.cli import app

FROZEN = Path(__file__).with_name("cli_surface.txt")


def surface() -> str:
    """One line per command, argument and option: names, what is given, help."""
    lines: list[str] = []
    root: Any = typer.main.get_command(app)
    commands = {"parafuse": root} | {f"parafuse {name}": cmd for name, cmd in sorted(root.commands.items())}
    for name, command in list(commands.items())[1:]:
        commands |= {f"{name} {sub}": one for sub, one in sorted(getattr(command, "commands", {}).items())}
    for name, command in commands.items():
        lines.append(f"{name}: {' '.join((command.help or '').split())}")
        for parameter in command.params:
            flags = ", ".join(parameter.opts)
            what = "" if getattr(parameter, "is_flag", False) else f" {parameter.metavar or 'TEXT'}"
            lines.append(f"  {flags}{what}: {' '.join((parameter.help or '').split())}")
    return "\n".join(lines) + "\n"


def test_the_surface_is_the_frozen_one() -> None:
    assert surface() == FROZEN.read_text()


if __name__ == "__main__":
    print(surface(), end="")
