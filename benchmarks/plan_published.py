"""What the planner predicts beside what others have published: `python -m benchmarks.plan_published [--page
docs/planner.md]`.

`published.json` has the times, each with its source and how far it can be trusted. A request of each row is predicted
on the machine that it names, in its layout; nothing is fitted to these rows. Differences of engines remain: their
kernels are not ours. Where a row says which attention it ran, or how much memory its cards have, that is taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import parafuse

ROWS = Path(__file__).with_name("published.json")
OFF = 0.25
"""From which on a row needs a reason."""
TRUST = ("high", "middle", "low")


def call_of(row: dict[str, Any]) -> dict[str, Any]:
    """Keywords of the pipeline's call."""
    call = {"height": row["height"], "width": row["width"], "num_inference_steps": row["steps"]}
    call |= {"num_frames": row["num_frames"]} if row["num_frames"] else {}
    if not row["guidance"] and row["model"] in ("sdxl", "sd3.5-large", "wan2.1-14b", "wan2.2-a14b"):
        call["guidance_scale"] = 1.0
    return call


def _stated(device: Any, row: dict[str, Any]) -> Any:
    """The device as the row has it: its attention, and memory of modified cards."""
    rate, room = row.get("attention_flops"), row.get("memory_bytes")
    attention = {**device.attention, row["dtype"]: rate} if rate else device.attention
    return dataclasses.replace(device, attention=attention, memory_bytes=room or device.memory_bytes)


def predicted(row: dict[str, Any]) -> float | None:
    """Seconds of what the row has timed; None where no plan is legal."""
    config = parafuse.Config(
        parallel=parafuse.Parallel(**row["degrees"]), dtype=row["dtype"], quantize=row["quantize"] or None,
        vae="tiled" if row["num_frames"] else "auto",
    )  # fmt: skip
    asked = f"random:{row['model']}", row["hardware"], call_of(row), config
    try:
        found = parafuse.plans(*asked, fidelity="fast", requests=10**9)
    except parafuse.ParafuseError as error:
        print(f"{row['model']} on {row['hardware']}: {error}", file=sys.stderr)
        return None
    device = _stated(found.machine.device, row)
    if device != found.machine.device:
        there = dataclasses.replace(found.machine, device=device)
        found = parafuse.plans(asked[0], there, *asked[2:], fidelity="fast", requests=10**9)
    fits = [
        one
        for one in found.costs
        if one.candidate.compile == row["compile"]
        and one.candidate.quantize == row["quantize"]
        and not one.candidate.cache
    ]
    fits.sort(key=lambda one: bool(one.candidate.offload))  # weights stay where they fit
    if not fits:
        return None
    seconds = {"end to end": fits[0].seconds, "denoising": fits[0].denoise.total, "step": fits[0].step_s}
    return seconds[row["what"]]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """In Markdown, and what it says."""
    lines = ["| model | size | hardware | layout | steps | published | predicted | error | trust | owner |"]
    lines.append("|---|---|---|---|---:|---:|---:|---:|---|---|")
    errors: dict[str, list[float]] = {}
    reasons: list[str] = []
    for row in rows:
        seconds = predicted(row)
        layout = " x ".join(f"{axis} {degree}" for axis, degree in row["degrees"].items() if degree > 1) or "1"
        layout += "".join(f", {one}" for one in ("compile" if row["compile"] else "", row["quantize"]) if one)
        size = f"{row['width']}x{row['height']}" + (f"x{row['num_frames']}" if row["num_frames"] else "")
        what = "" if row["what"] == "end to end" else f" ({row['what']})"
        start = (
            f"| {row['model']} | {size} | {row['hardware']} | {layout} | {row['steps']} | {row['seconds']:.4g} s{what}"
        )
        end = (
            f"{row['trust']} | [{row['owner']}]({row['source']}) |"
            if "http" in row["source"]
            else f"{row['trust']} | {row['owner']} |"
        )
        if seconds is None:
            lines.append(f"{start} | does not fit | | {end}")
            continue
        error = seconds / row["seconds"] - 1
        errors.setdefault(row["trust"], []).append(abs(error))
        lines.append(f"{start} | {seconds:.4g} s | {error:+.0%} | {end}")
        if abs(error) > OFF:
            reasons.append(
                f"- {row['model']} {size}, {row['hardware']}, {layout} ({row['owner']}, {error:+.0%}): {row['remarks']}"
            )
    every = [error for found in errors.values() for error in found]
    said = [
        f"{trust} {statistics.median(errors[trust]):.0%} ({len(errors[trust])})" for trust in TRUST if trust in errors
    ]
    within = sum(error <= OFF for error in every)
    whole = f"Median error {statistics.median(every):.0%} over {len(every)} rows; by trust: {', '.join(said)}."
    lines += ["", f"{whole} {within} are within {OFF:.0%}."]
    return [*lines, "", f"What is known of the {len(reasons)} others:", "", *reasons]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", help="Markdown file with a place for the table, between two <!-- plan-published -->")
    parser.add_argument("--model", action="append", help="only these")
    args = parser.parse_args()
    rows = [row for row in json.loads(ROWS.read_text()) if not args.model or row["model"] in args.model]
    rows.sort(key=lambda row: (row["model"], TRUST.index(row["trust"]), row["hardware"]))
    lines = table(rows)
    print("\n".join(lines))
    if args.page:
        page, mark = Path(args.page), "<!-- plan-published -->"
        before, _, rest = page.read_text().partition(mark)
        page.write_text("\n".join([before + mark, "", *lines, "", mark + rest.partition(mark)[2]]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
