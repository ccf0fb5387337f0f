"""Importing parafuse is free: no torch, no changed global state; its names come when they are asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import parafuse

ROOT = Path(__file__).resolve().parents[2]
CACHES = (
    "Cache DeepCache FasterCache FirstBlockCache ForaCache IntervalCache MagCache MaskCache PyramidAttentionBroadcast "
    "TGateCache TaylorSeerCache TeaCache TokenMerging"
).split()
QUANTIZATIONS = "Fp8 Fp8Weight Int8 Int8Weight Quantize".split()
ATTENTIONS = "Attention Content Radial Sparse Window".split()
NAMES = sorted(
    [
        *CACHES,
        *QUANTIZATIONS,
        *ATTENTIONS,
        "AsyncEngine",
        "Config",
        "Engine",
        "Handle",
        "ParafuseError",
        "Parallel",
        "Plan",
        "Progress",
        "Result",
        "apply",
        "plans",
    ]
)
STATE = """
import asyncio, atexit, json, locale, logging, os, random, signal, sys, threading, warnings
def state():
    loggers = {name: (l.level, len(l.handlers), l.disabled, l.propagate)
               for name, l in logging.Logger.manager.loggerDict.items() if isinstance(l, logging.Logger)}
    torch = sys.modules.get("torch")
    return {
        "warnings": [str(f) for f in warnings.filters],
        "showwarning": str(warnings.showwarning),
        "root logger": [logging.root.level, len(logging.root.handlers), logging.root.manager.disable],
        "loggers": {name: l for name, l in sorted(loggers.items()) if not name.startswith("parafuse")},
        "environment": dict(os.environ),
        "hooks": [str(h) for h in (sys.excepthook, sys.displayhook, threading.excepthook, sys.stdout, sys.stderr)],
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "random": str(random.getstate())[:200],
        "threads": threading.active_count(),
        "exit functions": atexit._ncallbacks(),
        "folder": os.getcwd(),
        "recursion": sys.getrecursionlimit(),
        "torch": torch and [torch.get_num_threads(), torch.get_default_dtype().__repr__(), torch.is_grad_enabled(),
                            torch.initial_seed() == torch.default_generator.initial_seed(),
                            str(torch.get_rng_state().sum()), torch.are_deterministic_algorithms_enabled(),
                            torch.get_float32_matmul_precision(),
                            str(torch.nn.functional.scaled_dot_product_attention), str(torch.nn.Module.__call__)],
    }
"""


def fresh(code: str, **env: str) -> Any:
    """What `code` prints as JSON, in a new Python."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def changed(before: str, action: str) -> dict[str, list[Any]]:
    """Global state that `action` changes, where `before` has been imported already: name -> [before, after]."""
    code = (
        f"{STATE}\n{before}\nold = state()\n{action}\nnew = state()\n"
        "print(json.dumps({k: [old[k], new[k]] for k in old if old[k] != new[k]}, default=str))"
    )
    return fresh(code)


def test_importing_parafuse_imports_nothing_heavy() -> None:
    code = "import sys, json, parafuse; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    loaded = fresh(code)
    assert "parafuse" in loaded
    assert not {"torch", "numpy", "diffusers", "transformers", "PIL", "typer", "rich"} & set(loaded)


def test_config_and_plan_import_no_torch() -> None:
    code = (
        "import sys, json, parafuse\n"
        "parafuse.Config(parallel=parafuse.Parallel(ring=2)); parafuse.Plan\n"
        "print(json.dumps([name for name in ('torch', 'diffusers', 'numpy') if name in sys.modules]))"
    )
    assert fresh(code) == []


def test_importing_parafuse_changes_no_global_state() -> None:
    assert changed("", "import parafuse, parafuse.config, parafuse.log; parafuse.Config; parafuse.Plan") == {}


def test_the_engine_changes_no_global_state_beyond_what_its_libraries_do() -> None:
    libraries = (
        "import torch, torch.distributed, torch.utils._pytree, torch.distributed.device_mesh, diffusers\n"
        "from rich.progress import Progress\nfrom diffusers import DiffusionPipeline"
    )
    assert changed(libraries, "import parafuse; parafuse.Engine; parafuse.apply; parafuse.Handle") == {}


def test_a_change_would_be_seen() -> None:
    """Negative control of the two tests above."""
    action = "warnings.filterwarnings('ignore'); logging.getLogger('x').setLevel(50); os.environ['X_Y'] = '1'"
    assert set(changed("", action)) == {"warnings", "loggers", "environment"}


def test_the_names_are_those_that_are_documented() -> None:
    assert sorted(parafuse.__all__) == NAMES
    for name in NAMES:
        thing = getattr(parafuse, name)
        assert thing.__name__ == name
        assert thing.__doc__
        assert thing.__module__.startswith("parafuse.")
    assert set(NAMES) | {"__version__"} <= set(dir(parafuse))
    assert parafuse.__version__.count(".") == 2


def test_other_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'parafuse' has no attribute 'Engin'"):
        _ = parafuse.Engin
    assert not hasattr(parafuse, "torch")
    with pytest.raises(ImportError):
        exec("from parafuse import nothing")
