"""`parafuse bench serve`: an open-loop load on a server that runs: requests come when they come, answered or not."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parafuse.errors import ConfigError
from parafuse.hardware import versions
from parafuse.launch.bench.record import commit, save_beside, short_hardware, today
from parafuse.launch.serve.bench_figures import BROKEN, CANCELLED, DONE, UNANSWERED, figures
from parafuse.launch.serve.bench_load import Kind, Load, arrivals, planned, read_mix
from parafuse.launch.serve.bench_options import ServeBench

SCHEMA = 1
LATE_S = 0.1
"""By which requests may be sent late (95th percentile), before the generator itself is too slow for the test."""


def run(options: ServeBench, console: Console | None = None) -> int:
    """Puts the load on the server, prints a table and writes a record. 0, or 1 where an answer was broken, missing, or
    the generator too slow. Raises ConfigError before anything is sent."""
    secrets, kinds = prepare(options)
    chance = random.Random(options.seed)
    times = arrivals(options.arrivals, options.rate, options.duration_s, burst=options.burst, chance=chance)
    plan = planned(times, kinds, len(secrets), chance)
    if not plan:
        raise ConfigError(f"--rate {options.rate}: no request comes in {options.duration_s:g} s; ask for more of them.")
    load = Load(options.url, secrets, patience_s=options.patience_s)
    asyncio.run(load.run(plan, options.duration_s))
    found = figures(load.outcomes, options.duration_s, load.health_s) | {"health_failed": load.health_failed}
    path = _save(options, kinds, found, load)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        shown = console or Console()
        for table in tables(found):
            shown.print(table)
        shown.print(f"record: {path}")
    faults = faults_of(found)
    for fault in faults:
        (console or Console(stderr=True)).print(f"[bold]{fault}[/bold]")
    return 1 if faults else 0


def prepare(options: ServeBench) -> tuple[list[str], list[Kind]]:
    """(secrets, kinds of requests). Raises ConfigError."""
    secrets: list[str] = []
    if options.secrets is not None:
        try:
            lines = Path(options.secrets).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--secrets {options.secrets!r}: cannot be read ({error}).") from error
        secrets = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not secrets or not all(line.isascii() and line.isprintable() and " " not in line for line in secrets):
            raise ConfigError(f"--secrets {options.secrets!r}: must hold the secret of one API key in each line.")
    if options.mix is not None:
        return secrets, read_mix(options.mix, len(secrets))
    body = {name: getattr(options, name) for name in ("size", "steps", "n", "deadline_s")}
    kind = Kind(cancel=options.cancel, body={name: value for name, value in body.items() if value is not None})
    return secrets, [kind]


def faults_of(found: dict[str, Any]) -> list[str]:
    """What makes a test's figures doubtful, or the server wrong."""
    ends, faults = found["ends"], list[str]()
    if ends[BROKEN]:
        codes = ", ".join(f"{number} x {code}" for code, number in found["codes"].items())
        faults.append(f"{ends[BROKEN]} requests had broken answers ({codes})")
    if not ends[DONE] and ends[CANCELLED] < found["requests"]:
        faults.append("no request was done: there is nothing to be measured")
    if ends[UNANSWERED]:
        faults.append(f"{ends[UNANSWERED]} requests were still open at the end; give more --patience")
    if found["health_failed"]:
        faults.append(f"health failed {found['health_failed']} times")
    if found["sent_late_s"].get("p95", 0.0) > LATE_S:
        faults.append("requests were sent late: this process is too slow for such a load; take another machine")
    return faults


def tables(found: dict[str, Any]) -> list[Table]:
    """For people."""
    ends = Table(title="requests")
    for name in ("requests", *found["ends"], "good"):
        ends.add_column(name, justify="right")
    ends.add_row(str(found["requests"]), *(str(number) for number in found["ends"].values()), str(found["good"]))
    rates = Table(title="a second")
    for name in ("offered", "done", "good"):
        rates.add_column(name, justify="right")
    rates.add_row(*(f"{found[name]:.3f}" for name in ("offered_per_s", "done_per_s", "goodput_per_s")))
    times = Table(title="seconds (of what was done; from when it was due)")
    for name in ("", "p50", "p90", "p95", "p99", "mean", "max"):
        times.add_column(name, justify="left" if not name else "right")
    for name in ("latency", "queued", "service", "refusal", "health", "sent_late"):
        if one := found[f"{name}_s"]:
            times.add_row(
                name.replace("_", " "), *(f"{one[q]:.4g}" for q in ("p50", "p90", "p95", "p99", "mean", "max"))
            )
    keys = Table(title="keys", caption=_fairness(found["fairness"]))
    for name in ("key", "requests", "done", "share", "rank-seconds", "p50", "p95"):
        keys.add_column(name, justify="left" if name == "key" else "right")
    for key, one in found["keys"].items():
        latency = [f"{one['latency_s'][q]:.4g}" if one["latency_s"] else "-" for q in ("p50", "p95")]
        shares = f"{one['share_done']:.0%}", f"{one['rank_seconds']:.4g}"
        keys.add_row(key, str(one["requests"]), str(one["done"]), *shares, *latency)
    return [ends, rates, times, keys]


def _fairness(found: dict[str, float | None]) -> str:
    told = {name: "-" if value is None else f"{value:.3f}" for name, value in found.items()}
    return f"Jain's index: {told['of_share_done']} of shares done, {told['of_rank_seconds']} of rank-seconds"


def _save(options: ServeBench, kinds: list[Kind], found: dict[str, Any], load: Load) -> Path:
    number, changed = commit()
    date = today()
    record = {
        "schema": SCHEMA,
        "theme": "serve",
        "options": asdict(replace(options, secrets=None)),
        "kinds": [asdict(kind) for kind in kinds],
        "commit": number,
        "dirty": changed,
        "date": date,
        "versions": versions(),
        "figures": found,
        "outcomes": [asdict(one) for one in load.outcomes],
        "health_s": load.health_s,
    }
    stem = f"serve_{short_hardware('', 1)}_{date[:10]}_{number}{'-dirty' if changed else ''}"
    (path,) = save_beside(stem, Path(options.out), {".json": json.dumps(record, indent=1) + "\n"})
    return path
