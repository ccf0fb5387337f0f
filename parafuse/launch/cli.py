"""The command line: `parafuse generate`, `parafuse info`, `parafuse --version`.

Errors of the user end with one line on stderr and exit code 2. `parafuse --help` imports no torch."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

import parafuse
from parafuse import log
from parafuse.config import Config
from parafuse.errors import ConfigError, ParafuseError, nearest
from parafuse.launch import calibrate as calibrating
from parafuse.launch import export as exporting
from parafuse.launch import generate as generating
from parafuse.launch import plan as planning
from parafuse.launch import prove as proving
from parafuse.launch import quantize as quantizing
from parafuse.launch import quiet
from parafuse.launch import tune as tuning
from parafuse.launch import verify as verifying
from parafuse.launch.asked import PLACING, Asked, start_ranks
from parafuse.launch.batch import command as batching
from parafuse.launch.bench import command as benching
from parafuse.launch.bench.starts import STARTS_ENV
from parafuse.launch.options import build, given, options_of, with_options
from parafuse.launch.score import command as scoring
from parafuse.launch.serve import command as serving
from parafuse.launch.serve.bench_options import ServeBench
from parafuse.parallel import rank_entry

app = typer.Typer(
    name="parafuse",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
FIRST_RANK_TELLS_S = 2.0
"""How long a rank waits with its line under another launcher, in case rank 0 has the same one to tell."""
PICTURE_OPTIONS = options_of(generating.Picture)
CONFIG_OPTIONS = options_of(Config, panel="Configuration")
BENCH_OPTIONS = options_of(benching.Bench)
PROOF_OPTIONS = options_of(proving.Proof)
TRIAL_OPTIONS = options_of(verifying.Trial)
CALIBRATE_OPTIONS = options_of(calibrating.Calibrate)
PACKING_OPTIONS = [option for option in options_of(quantizing.Packing) if option.name != "ranks"]
EXPORT_OPTIONS = [option for option in options_of(exporting.Export) if option.name != "ranks"]
PLANNING_OPTIONS = [option for option in options_of(planning.Planning) if option.name != "seed"]
SCORING_OPTIONS = options_of(scoring.Scoring)
TUNING_OPTIONS = [option for option in options_of(tuning.Tuning) if option.name != "ranks"]
SERVING_OPTIONS = options_of(serving.Serve)
SERVE_BENCH_OPTIONS = options_of(ServeBench)
BATCH_OPTIONS = options_of(batching.Batch)
EXTRAS = ("cache", "quantize", "compile", "cuda_graphs", "rewrites", "attention", "sparse", *PLACING)
NEW_OBJECTS = 100_000
"""After which Python looks for garbage in a process of the command line. Its own 700 cost a sixth of a cold start,
which imports some millions that all stay."""
LOADING_OPTIONS = [option for option in CONFIG_OPTIONS if len(option.path) == 1 and option.name not in EXTRAS]
"""Those of the configuration without the degrees, where all of them are tried, and without a cache, which a case's
variants name and an exported plan cannot have."""


@dataclass(frozen=True)
class Launch:
    """How this process was started."""

    argv: Sequence[str]
    supervised: bool
    """By `parafuse.parallel.ranks`: the parent reports errors, from the error file."""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"parafuse {parafuse.__version__}")
        raise typer.Exit


VersionOption = Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)]


@app.callback(help=parafuse.__doc__)
def top(version: VersionOption = False) -> None:
    pass


@app.command()
@with_options(*PICTURE_OPTIONS, *CONFIG_OPTIONS)
def generate(
    ctx: typer.Context,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to paint; each in quotes.")],
    **options: Any,
) -> int:
    """Paint prompts, on as many ranks as asked for. The picture does not depend on their number."""
    picture = build(generating.Picture(), given(PICTURE_OPTIONS, options))
    _hush(picture)
    job = generating.prepare(prompts, picture, CONFIG_OPTIONS, options)
    if job.world_size > 1 and "RANK" not in os.environ:
        return start_ranks(job.world_size, ctx.obj.argv)
    generating.paint(job)
    return 0


@app.command()
@with_options(*TRIAL_OPTIONS, *CONFIG_OPTIONS)
def verify(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="For a model that takes one.")] = None,
    **options: Any,
) -> int:
    """Hold a model on several ranks against itself alone, in every layout of these ranks. Exit code 1: they differ.

    The calls of its denoiser in one run (of one step, if --steps does not say otherwise) are compared, not pictures;
    with --quality, the pictures of one layout over a set of prompts."""
    trial = build(verifying.Trial(), given(TRIAL_OPTIONS, options))
    _hush(trial)
    job = verifying.prepare(prompt, trial, CONFIG_OPTIONS, options)
    if job.world_size > 1 and "RANK" not in os.environ:
        return start_ranks(job.world_size, ctx.obj.argv)
    (verifying.run_quality if trial.quality else verifying.run)(job)
    return 0


@app.command()
@with_options(*PROOF_OPTIONS, *CONFIG_OPTIONS)
def prove(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="In place of a set of them.")] = None,
    **options: Any,
) -> int:
    """Time a model's own pipeline, parafuse's plan for these ranks, and other engines, side by side, end to end.

    Writes one report with figures, parts and pictures, to keep or to send: HTML and JSON."""
    proof = build(proving.Proof(), given(PROOF_OPTIONS, options))
    _hush(proof)
    job = proving.prepare(prompt, proof, CONFIG_OPTIONS, options)
    if job.world_size > 1 and "RANK" not in os.environ:
        return start_ranks(job.world_size, ctx.obj.argv)
    proving.run(job)
    return 0


@app.command()
@with_options(*CALIBRATE_OPTIONS, *(option for option in CONFIG_OPTIONS if option.name != "cache"))
def calibrate(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="In place of a set of them.")] = None,
    **options: Any,
) -> int:
    """Measure a model for TeaCache and MagCache: how much changes from step to step, with everything computed.

    Writes one JSON file, for this model and no other: --cache magcache:0.06,calibration=FILE."""
    asked = build(calibrating.Calibrate(), given(CALIBRATE_OPTIONS, options))
    _hush(asked)
    job = calibrating.prepare(prompt, asked, CONFIG_OPTIONS, options)
    if job.world_size > 1 and "RANK" not in os.environ:
        return start_ranks(job.world_size, ctx.obj.argv)
    calibrating.run(job)
    return 0


@app.command()
@with_options(*PACKING_OPTIONS, *(option for option in CONFIG_OPTIONS if option.name == "quantize"), *LOADING_OPTIONS)
def quantize(
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="In place of a set of them.")] = None,
    **options: Any,
) -> None:
    """Measure what 8 bits lose, one forward for each group of layers, and write the model in 8 bits: --out DIR.

    The folder is loaded by its name, here and by diffusers, without the model as it was. On one rank."""
    packing = build(quantizing.Packing(), given(PACKING_OPTIONS, options))
    _hush(packing)
    chosen = [option for option in CONFIG_OPTIONS if option.name == "quantize"]
    quantizing.run(quantizing.prepare(prompt, packing, [*chosen, *LOADING_OPTIONS], options))


@app.command("export-plan")
@with_options(*EXPORT_OPTIONS, *LOADING_OPTIONS)
def export_plan(
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="For a model that takes one.")] = None,
    **options: Any,
) -> None:
    """Write how a model's tokens are split as a _cp_plan, for diffusers' own context parallel (enable_parallelism).

    Derived from one denoising step on one rank; refused where diffusers' form cannot say it."""
    export = build(exporting.Export(), given(EXPORT_OPTIONS, options))
    _hush(export)
    exporting.run(exporting.prepare(prompt, export, LOADING_OPTIONS, options))


@app.command()
@with_options(*PLANNING_OPTIONS, *CONFIG_OPTIONS)
def plan(
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="As --model.")] = None,
    **options: Any,
) -> None:
    """Show the best plan for so many ranks and why it is; with --memory, what it takes there, phase by phase.

    Nothing is loaded or downloaded, and the hardware need not be here: --hardware 8xh200."""
    asked = build(planning.Planning(), given(PLANNING_OPTIONS, options))
    _hush(asked)
    if name is not None and options.get("model") not in (None, name):
        raise ConfigError(f"--model {options['model']!r}: beside MODEL {name!r}; leave one out.")
    planning.run(planning.prepare(name or asked.model, asked, CONFIG_OPTIONS, options))


bench_app = typer.Typer(invoke_without_command=True, no_args_is_help=False)
app.add_typer(bench_app, name="bench")


@bench_app.callback()
@with_options(*BENCH_OPTIONS, *LOADING_OPTIONS)
def bench(ctx: typer.Context, **options: Any) -> int:
    """Time a case's variants in turns, against its baseline, and write a record; `report` and `compare` read these."""
    if ctx.invoked_subcommand is not None:
        return 0
    asked = build(benching.Bench(), given(BENCH_OPTIONS, options))
    _hush(asked)
    job = benching.prepare(asked, LOADING_OPTIONS, options)
    if "RANK" not in os.environ:
        starts = benching.starts_for(job)
        if starts:
            os.environ[STARTS_ENV] = starts
        if job.world_size > 1:
            return start_ranks(job.world_size, ctx.obj.argv)
    benching.run(job)
    return 0


@bench_app.command("serve")
@with_options(*SERVE_BENCH_OPTIONS)
def bench_serve(**options: Any) -> int:
    """Put load on a running server, open loop, and tell latencies, goodput and fairness between keys."""
    serving.check_packages()
    asked = build(ServeBench(), given(SERVE_BENCH_OPTIONS, options))
    from parafuse.launch.serve.bench import run

    return run(asked)


@bench_app.command("report")
def bench_report(
    records: Annotated[list[str], typer.Argument(metavar="RECORD", help="JSON files that bench has written.")],
    out: Annotated[str, typer.Option(help="Folder for the pages and plots.")] = "out/bench",
    page: Annotated[
        str | None, typer.Option(help="Instead: put each ladder into this page, between two <!-- bench:CASE -->.")
    ] = None,
) -> None:
    """Write records as Markdown, and plots of them (SVG and PNG)."""
    benching.report(records, out, page)


@bench_app.command("compare")
def bench_compare(
    first: Annotated[str, typer.Argument(metavar="A", help="JSON file that bench has written.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one, of the same case.")],
) -> None:
    """Say what moved between two records of one case, beyond the spread of both."""
    benching.compare(first, second)


tune_app = typer.Typer(no_args_is_help=True)
app.add_typer(tune_app, name="tune", help="Time what there is a choice of on this machine, and keep the result.")


@tune_app.callback()
def tune() -> None:
    pass


@tune_app.command("attention")
@with_options(*TUNING_OPTIONS, *LOADING_OPTIONS, *(o for o in CONFIG_OPTIONS if o.name in ("ulysses", "ring")))
def tune_attention(
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="For a model that takes one.")] = None,
    **options: Any,
) -> None:
    """Time attention backends on the calls of a model, or on shapes, for attention=auto. On one rank.

    With --ulysses or --ring: on what one rank of so many computes at a time."""
    asked = build(tuning.Tuning(), given(TUNING_OPTIONS, options))
    _hush(asked)
    degrees = [option for option in CONFIG_OPTIONS if option.name in ("ulysses", "ring")]
    tuning.run(tuning.prepare(prompt, asked, [*LOADING_OPTIONS, *degrees], options))


@app.command()
@with_options(*SERVING_OPTIONS, *CONFIG_OPTIONS)
def serve(**options: Any) -> int:
    """Serve a model over HTTP: a queue that loses nothing, on ranks that are started again when they fail.

    The API is OpenAI's, for pictures and videos. It listens on the loopback address until it has keys (serve-key)."""
    asked = build(serving.Serve(), given(SERVING_OPTIONS, options))
    if not asked.verbose:
        quiet.silence_libraries()
    return serving.run(serving.prepare(asked, CONFIG_OPTIONS, options))


@app.command("serve-key")
def serve_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is, for logs and metrics.")] = "",
    webhooks: Annotated[bool, typer.Option("--webhooks", help="Its jobs may name webhooks; these are signed.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="It may read /metrics, which tell of all keys.")] = False,
) -> None:
    """Make an API key: the secret, for its user alone, and the line for the server's file of keys."""
    serving.check_packages()
    from parafuse.launch.serve.keys import make_key

    secret, line = make_key(name, webhooks=webhooks, metrics=metrics)
    print(f"secret, shown once: {secret}", file=sys.stderr)
    print(line)


@app.command()
@with_options(*BATCH_OPTIONS, *CONFIG_OPTIONS)
def batch(
    file: Annotated[str, typer.Argument(metavar="FILE", help='A JSON object in each line: {"prompt": "a red apple"}.')],
    **options: Any,
) -> int:
    """Paint a file of prompts, however many, on engines that Ray spreads over machines.

    Each line is done once: the same command goes on where it was ended."""
    asked = build(batching.Batch(), given(BATCH_OPTIONS, options))
    if not asked.verbose:
        quiet.silence_libraries()
    return batching.run(batching.prepare(file, asked, CONFIG_OPTIONS, options))


@app.command()
@with_options(*SCORING_OPTIONS)
def score(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Of PNG, JPEG or WebP pictures.")],
    **options: Any,
) -> None:
    """Judge a folder of pictures: by another folder (PSNR, SSIM, LPIPS, FID), by prompts (CLIP score), or by both.

    Weights are taken from where they lie; nothing is downloaded."""
    asked = build(scoring.Scoring(), given(SCORING_OPTIONS, options))
    _hush(asked)
    scoring.run(scoring.prepare(folder, asked))


def _hush(asked: Asked | benching.Bench | scoring.Scoring) -> None:
    if not asked.verbose:
        quiet.silence_libraries()
    if asked.quiet:
        quiet.silence_notes()


@app.command()
def info(
    json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Hardware, versions, backends, and what is missing for what."""
    from parafuse.launch.info import show_info

    quiet.silence_libraries()
    show_info(as_json=json)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script and of `python -m parafuse`. Always ends the process."""
    gc.set_threshold(NEW_OBJECTS, 100)
    supervised = rank_entry.enter()
    launch = Launch(sys.argv[1:] if argv is None else list(argv), supervised)
    code = run(launch)
    if code and "RANK" in os.environ:
        # the other ranks may wait in a collective, and tearing it down would wait for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(launch: Launch) -> int:
    """Runs one command line and reports its errors; returns the exit code."""
    try:
        return app(args=list(launch.argv), prog_name="parafuse", standalone_mode=False, obj=launch) or 0
    except TyperException as error:
        one_line, code, shown = True, error.exit_code, ParafuseError(_usage(error))
    except ParafuseError as error:
        one_line, code, shown = True, error.exit_code, error
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as in `parafuse info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # everything else is told in full, from our own frames on
        one_line, code, shown = False, 1, error.with_traceback(_own_frames(error))
    if str(shown) or not one_line:  # an empty line: no command was given, and the help is on the screen
        report(shown, one_line=one_line, code=code, supervised=launch.supervised)
    return code


def _usage(error: TyperException) -> str:
    """A usage error in one line; for an unknown option, the nearest known one."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if type(error).__name__ == "NoSuchOption" and option and context is not None:
        known = ["--help", *(flag for parameter in context.command.params for flag in parameter.opts)]
        return f"unknown option {option!r}{nearest(option, known)} ({context.command_path} --help lists all)."
    return " ".join(error.format_message().split())


def _own_frames(error: BaseException) -> TracebackType | None:
    """The traceback from `generate` on, without the frames of the command-line library that lead to it."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != generating.__file__:
        frames = frames.tb_next
    return frames or error.__traceback__


def report(error: BaseException, *, one_line: bool, code: int, supervised: bool) -> None:
    """Tells why this process ends: to its launcher if it has one, else on stderr, a rank's lines led by its rank."""
    recorded = rank_entry.record(error, one_line=one_line, exit_code=code)
    told_elsewhere = (one_line and log.rank() != 0) or (not one_line and rank_entry.is_secondary(error))
    if recorded and supervised:
        return  # the launcher shows it
    if recorded and told_elsewhere:
        if not one_line:
            return  # it follows from another rank's end, which tells
        time.sleep(FIRST_RANK_TELLS_S)  # by then the launcher has ended this rank, if rank 0 has told the same
    if one_line:
        where = f"rank {log.rank()}: " if log.rank() != 0 else ""
        print(f"parafuse: error: {where}{error}", file=sys.stderr, flush=True)
        return
    lead = f"[rank {log.rank()}] " if "RANK" in os.environ else ""
    text = "".join(traceback.format_exception(error)).rstrip("\n")
    print("\n".join(lead + line for line in text.split("\n")), file=sys.stderr, flush=True)
