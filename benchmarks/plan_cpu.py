"""Is the planner right, on two CPU cores? Predicted step times against measured ones, and the choice against the
fastest.

`python -m benchmarks.plan_cpu`: some models of real classes, made here, each at two sizes, in every legal layout of 1
and 2
ranks. The machine is probed by `parafuse plan --probe`, which sees none of these models. Layouts are timed in turns,
in the
same two processes; medians. Writes docs/planner-cpu.json and puts the table into docs/planner.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import parafuse
from benchmarks.two_ranks import on_two_ranks

ROOT = Path(__file__).parents[1]
STEPS, ROUNDS = 4, 4
ALONE = "1 rank"
MEDIAN_GOAL, WORST_GOAL, CHOICE_GOAL = 0.10, 0.30, 1.05
FLUX = {
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 8,
    "axes_dims_rope": [16, 24, 24],
}
WAN = {"num_layers": 6, "attention_head_dim": 64, "num_attention_heads": 6, "ffn_dim": 1536}
SD3 = {
    "num_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": 6,
    "caption_projection_dim": 384,
    "dual_attention_layers": [],
}
HUNYUAN = {
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 6,
    "rope_axes_dim": [16, 24, 24],
}
GUIDED = {"true_cfg_scale": 4.0, "negative_prompt": ""}
FRAMES = {"num_frames": 9}
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "emoji": ("emoji", {}, [{"width": 128, "height": 128, **GUIDED}, {"width": 192, "height": 192}]),
    "flux": ("tiny:flux.1-dev", FLUX, [{"width": 256, "height": 256}, {"width": 512, "height": 384}]),
    "wan": ("tiny:wan2.1-14b", WAN, [{"width": 128, "height": 128, **FRAMES}, {"width": 256, "height": 192, **FRAMES}]),
    "sd3": (
        "tiny:sd3.5-large",
        SD3,
        [
            {"width": 256, "height": 256},
            {"width": 384, "height": 384, "num_images_per_prompt": 2, "guidance_scale": 1.0},
        ],
    ),
    "hunyuan": (
        "tiny:hunyuanvideo",
        HUNYUAN,
        [{"width": 128, "height": 128, **FRAMES}, {"width": 192, "height": 256, **FRAMES}],
    ),
}
"""Name -> where the parts come from, another configuration of the transformer, the calls."""


def make(name: str, folder: Path) -> None:
    """Saves the pipeline of a case."""
    base, changes, _ = CASES[name]
    with parafuse.Engine.from_pretrained(base, parafuse.Config(device="cpu"), alone=True) as engine:
        pipeline = engine.pipeline
    if changes:
        torch.manual_seed(0)
        kind = type(pipeline.transformer)
        known = dict(pipeline.transformer.config)
        pipeline.register_modules(transformer=kind.from_config(known | changes))
    pipeline.save_pretrained(folder)


def predicted(folder: Path, call: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """Plans without compiling, the best first: `parafuse plan --json`."""
    words = [word for name, value in call.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    command = [
        sys.executable,
        "-m",
        "parafuse",
        "plan",
        str(folder),
        "--ranks",
        str(ranks),
        "--steps",
        str(STEPS),
        "--json",
    ]
    out = subprocess.run([*command, *words], check=True, capture_output=True, text=True).stdout
    return [one for one in json.loads(out)["choice"]["plans"] if not one["options"]["compile"]]


def probe(ranks: int) -> None:
    """Measures this machine, as a user would."""
    subprocess.run(
        [sys.executable, "-m", "parafuse", "plan", "emoji", "--ranks", str(ranks), "--probe"], check=True,
        stdout=subprocess.DEVNULL
    )  # fmt: skip


def measure(task: str, rank: int) -> dict[str, Any]:
    """Seconds of a step in each layout, all of them in turns: {layout: samples}."""
    folder, call, layouts = json.loads(task)
    samples: dict[str, list[float]] = {}
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for part in (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)):
        for tensor in (*part.parameters(), *part.buffers()):
            dist.broadcast(tensor.data, 0)  # what the folder has no values of is drawn by each rank for itself

    def run(degrees: dict[str, int], *, alone: bool) -> float:
        config = parafuse.Config(parallel=parafuse.Parallel(**degrees), vae="replicated")
        with parafuse.Engine.from_pipeline(pipeline, config, alone=alone) as engine:
            for _ in range(2):  # blocks are examined in the first call
                engine(prompt="a red apple", num_inference_steps=STEPS, seed=0, output_type="latent", **call)
            return statistics.median(engine.receipt["timings_s"]["steps"][1:])

    for _ in range(ROUNDS):
        for degrees in layouts:
            alone = all(degree == 1 for degree in degrees.values())
            for turn in range(2 if alone else 1):  # alone, one after the other
                dist.barrier()
                if not alone or rank == turn:
                    samples.setdefault(name_of(degrees), []).append(run(degrees, alone=alone))
    dist.barrier()
    return {"samples": samples}


def name_of(degrees: dict[str, int]) -> str:
    return " x ".join(f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1) or ALONE


def run(names: list[str]) -> list[dict[str, Any]]:
    """A row for each case, call and layout."""
    for ranks in (1, 2):
        probe(ranks)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        tasks: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], int]] = {}
        for name in names:
            place = Path(folder) / name
            make(name, place)
            for call in CASES[name][2]:
                alone, two = predicted(place, call, 1), predicted(place, call, 2)
                plans = [*alone, *two]
                task = json.dumps([str(place), call, [one["degrees"] for one in plans]])
                tasks[task] = name, call, plans, len(alone)
        found = on_two_ranks(measure, list(tasks))
    for task, (name, call, plans, num_alone) in tasks.items():
        both = [one["samples"] for one in found[task]]
        for number, plan in enumerate(plans):
            layout = name_of(plan["degrees"])
            ranks = both if layout != ALONE else both[:1]
            times = [max(pair) for pair in zip(*(one[layout] for one in ranks), strict=True)]
            rows.append({
                "model": name, "call": call, "layout": layout, "predicted_s": plan["step_s"],
                "measured_s": statistics.median(times), "samples_s": times, "chosen": number == num_alone,
                "parts_s": {part: seconds / STEPS for part, seconds in plan["denoise_s"].items() if seconds},
            })  # fmt: skip
    return rows


def error_of(row: dict[str, Any]) -> float:
    return abs(row["predicted_s"] / row["measured_s"] - 1)


def noise_of(row: dict[str, Any]) -> float:
    """Half of the spread of the samples without the largest and the least, over their median."""
    inner = sorted(row["samples_s"])[1:-1]
    return (inner[-1] - inner[0]) / 2 / row["measured_s"]


def report(rows: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """The table in Markdown, what it says, and whether the goals are met."""
    lines = [
        "| model | call | layout | predicted | measured | error | noise | |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        call = ", ".join(f"{name} {value}" for name, value in row["call"].items())
        numbers = f"{row['predicted_s'] * 1e3:.1f} ms | {row['measured_s'] * 1e3:.1f} ms"
        change = row["predicted_s"] / row["measured_s"] - 1
        mark = "chosen" if row["chosen"] else ""
        lines.append(
            f"| {row['model']} | {call} | {row['layout']} | {numbers} | {change:+.0%} | {noise_of(row):.0%} | {mark} |"
        )
    errors = [error_of(row) for row in rows]
    losses = list(choices(rows).values())
    good = statistics.median(errors) <= MEDIAN_GOAL and max(errors) <= WORST_GOAL and max(losses) <= CHOICE_GOAL
    median, worst, noise = statistics.median(errors), max(errors), statistics.median(map(noise_of, rows))
    fastest = sum(loss == 1 for loss in losses)
    said = (
        f"{len(rows)} combinations: median error {median:.1%} (goal {MEDIAN_GOAL:.0%}), worst {worst:.1%} (goal "
        f"{WORST_GOAL:.0%}), noise {noise:.1%}. The layout that was chosen took at most {max(losses):.2f} times the "
        f"time of the fastest (goal {CHOICE_GOAL}), and was the fastest in {fastest} of {len(losses)} cases."
    )
    lines += ["", said]
    return lines, good


def choices(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Case -> the time of the layout that was chosen for two ranks over that of the fastest one."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["layout"] != ALONE:
            cases.setdefault(f"{row['model']} {row['call']}", []).append(row)
    return {
        name: next(row["measured_s"] for row in found if row["chosen"]) / min(row["measured_s"] for row in found)
        for name, found in cases.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(CASES), action="append")
    parser.add_argument("--out", help="JSON file for the rows")
    parser.add_argument("--page", help="Markdown file with a place for the table, between two <!-- plan-cpu -->")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    rows = run(args.model or list(CASES))
    lines, good = report(rows)
    print("\n".join(lines))
    if args.out:
        Path(args.out).write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    if args.page:
        page = Path(args.page)
        before, mark, rest = page.read_text().partition("<!-- plan-cpu -->")
        page.write_text("\n".join([before + mark, "", *lines, "", mark + rest.partition(mark)[2]]))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
