"""What every command that runs a model is asked for, and how it comes by its ranks. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from parafuse.config import Config
from parafuse.engine.plan import Plan
from parafuse.errors import ConfigError

PLACING = ("placement", "max_memory", "offload_folder", "offload", "text_encoders", "vae")
"""Options of commands that run an engine; others keep a model together on a rank's device."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The model, the ranks, and the keywords of the pipeline's call."""

    model: str = "emoji"
    """The built-in emoji, a diffusers folder, a single-file checkpoint, a hub id, or an architecture without weights:
    random:flux.1-dev, or tiny:flux.1-dev for a CPU."""
    ranks: int | None = None
    """Processes to start on this machine, one for each GPU. Not given: 1, the plan's, or torchrun's."""
    seed: int | None = None
    """The same seed gives the same picture on any number of ranks. Not given: a new one, told with the picture."""
    steps: int | None = None
    """Denoising steps."""
    width: int | None = None
    """Pixels."""
    height: int | None = None
    """Pixels."""
    guidance: float | None = None
    """Guidance scale: how closely the picture follows the prompt."""
    negative_prompt: str | None = None
    """What the picture should not show."""
    set: tuple[str, ...] = ()
    """Any other keyword of the pipeline's call, its value as JSON: --set max_sequence_length=128. May be repeated."""
    config: str | None = None
    """JSON file with a configuration; options given beside it win."""
    quiet: bool = False
    """No progress bar and no notes; errors only."""
    verbose: bool = False
    """Show the warnings and logs of the libraries underneath."""

    def __post_init__(self) -> None:
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed {self.seed}: must be from 0 to 2^63 - 1.")
        if self.ranks is not None and self.ranks < 1:
            raise ConfigError(f"--ranks {self.ranks}: must be at least 1.")
        if self.quiet and self.verbose:
            raise ConfigError("--quiet and --verbose exclude each other; give one of them.")


def refuse_extras(command: str, config: Config, names: Sequence[str], way_out: str) -> None:
    """Raises ConfigError for what a command would ignore."""
    for name in names:
        value = getattr(config, name)
        if value != getattr(Config(), name):
            shown = f"={value}" if not isinstance(value, bool) else ""
            raise ConfigError(f"{command}: --{name.replace('_', '-')}{shown}: {way_out}")


def number_of_ranks(asked: Asked, plan: Plan | None = None) -> int:
    """Ranks of the launcher that started this process, else those asked for. Raises ConfigError when they differ."""
    if "RANK" in os.environ:
        try:
            running = int(os.environ["WORLD_SIZE"])
            rank = int(os.environ["RANK"])
        except (KeyError, ValueError) as error:
            raise ConfigError(
                "WORLD_SIZE: must be in the environment, a whole number, where RANK is; "
                "start with torchrun, or unset RANK."
            ) from error
        if not 0 <= rank < running:
            raise ConfigError(f"RANK={rank}: must be from 0 to WORLD_SIZE - 1 = {running - 1}.")
        if asked.ranks not in (None, running):
            raise ConfigError(
                f"--ranks {asked.ranks}: the launcher started {running}. Leave --ranks out, or start that many."
            )
        return running
    return asked.ranks or (plan.world_size if plan is not None else 1)


def start_ranks(world_size: int, argv: Sequence[str]) -> int:
    """Runs this same command line on `world_size` ranks of this machine; returns the exit code."""
    from parafuse.parallel import ranks

    command = [sys.executable, "-m", "parafuse", *argv]
    numbers = range(world_size)
    with ranks.start(command, ranks=numbers, world_size=world_size, master_port=ranks.free_port()) as processes:
        code = processes.wait()
        failure = processes.failure
    if code and sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a progress bar that was killed leaves the cursor hidden
    if failure is not None:
        print(failure.render(), file=sys.stderr, flush=True)
    elif code:
        print("parafuse: stopped; no rank is left running.", file=sys.stderr, flush=True)
    return code
