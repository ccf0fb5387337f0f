"""What torch.compile has made, kept from one process to the next: so a second start compiles nothing.

A file holds torch's own artifacts and, on the CPU, the libraries that its compiler has built from them, which torch
does not keep there. It is code: it is read from a folder of the user's alone, or where somebody says that its source
is trusted. Files are whole or not there: other ranks read them meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from parafuse import hardware
from parafuse.engine import plan_store
from parafuse.engine.plan import Plan
from parafuse.engine.receipt import versions
from parafuse.log import note

MAX_FILE_BYTES = 256 * 2**20
MAX_FOLDER_BYTES = 2 * 2**30
MAX_FILES = 8
"""Of one key: ranks may have made different graphs."""
NOT_IN_KEY = ("model", "timeout_s", "replay", "why", "attention_timings")
"""Fields of a plan that change no graph."""
_MADE_BY_TORCH, _NAMES, _ABLE, _LIBRARIES = "artifacts", "names.json", "instructions.json", "libraries/"
_LIBRARY = re.compile(r"[0-9a-z]{2}/[0-9a-z]{20,80}(\.main)?\.(so|cpp)")
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, NotImplementedError, RuntimeError, OSError,
)  # fmt: skip
"""What reading an archive that is broken, or has gone meanwhile, may raise."""
_SMALL_BYTES = 2**10
"""Sources of libraries by which torch tries what the processor can do are smaller."""


def machine(device: str) -> dict[str, str]:
    """What compiled code depends on."""
    on_gpu = device == "cuda" and torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else device
    able = str(torch.cuda.get_device_capability()) if on_gpu else torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "device": device,
        "name": name,
        "capability": able,
        "processor": hardware.processor(),
        "python": platform.python_version(),
    }


def key_of(plan: Plan) -> str:
    """Equal for the same model in the same plan under the same versions on the same kind of device."""
    facts = {name: value for name, value in plan.to_dict().items() if name not in NOT_IN_KEY}
    text = json.dumps([facts, versions(), machine(plan.device)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def folder() -> Path | None:
    """Where they are kept; None: nowhere."""
    where = plan_store.cache_folder()
    return None if where is None else where / "compiled"


def load(plan: Plan) -> str:
    """Gives torch what was kept for this plan; says what that is. Local; every rank calls it, before it compiles."""
    where = folder()
    if where is None or not where.is_dir():
        return "none"
    try:
        why_not = _why_not_ours(where)
    except OSError as error:
        why_not = str(error)
    if why_not:
        note(f"{where}: {why_not}; what was compiled earlier is not used")
        return f"not used: {why_not}"
    found = 0
    for file in _files(where, key_of(plan))[:MAX_FILES]:
        with contextlib.suppress(OSError):
            if not _why_not_ours(file):
                found += unpack(file.read_bytes())
                os.utime(file)  # the ones that are used stay longest
    return f"{found} files" if found else "none"


def save(plan: Plan) -> None:
    """Keeps what was compiled in this process; a folder that cannot be written is let be. Local."""
    where = folder()
    try:
        packed = pack() if where is not None else None
    except (OSError, RuntimeError) as error:
        note(f"what was compiled cannot be packed ({error}); it is not kept")
        return
    if where is None or packed is None:
        return
    data, names = packed
    if len(data) > MAX_FILE_BYTES:
        note(f"what was compiled takes {len(data) >> 20} MB, more than {MAX_FILE_BYTES >> 20}; it is not kept")
        return
    own = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    file = where / f"{key_of(plan)}-{own}.zip"
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        if file.exists() or _why_not_ours(where):
            return
        part = where / f"{file.name}.{os.getpid()}.part"
        try:
            part.touch(mode=0o600)
            part.write_bytes(data)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
        _tidy(where, key_of(plan), file, set(names))
    except OSError:
        return


def pack() -> tuple[bytes, list[str]] | None:
    """(all that was compiled in this process so far, its names); None where that is nothing."""
    made = torch.compiler.save_cache_artifacts()
    if made is None:
        return None
    names = sorted(f"{kind}/{key}" for kind, keys in made[1].artifacts.items() for key in keys)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_NAMES, json.dumps(names))
        archive.writestr(_ABLE, json.dumps(_instructions()))
        archive.writestr(_MADE_BY_TORCH, made[0])
        for file in _libraries():
            with contextlib.suppress(OSError):
                archive.write(file, f"{_LIBRARIES}{file.parent.name}/{file.name}")
    return out.getvalue(), names


def unpack(data: bytes) -> bool:
    """Gives torch what `pack` has packed; False where it finds nothing in it. This can run code."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            made = archive.read(_MADE_BY_TORCH)
            for name in archive.namelist():
                inner = name.removeprefix(_LIBRARIES)
                if name.startswith(_LIBRARIES) and _LIBRARY.fullmatch(inner):
                    _put(_cache_dir() / inner, archive.read(name))
            _take_instructions(json.loads(archive.read(_ABLE)))
    except _UNREADABLE:
        return False
    return torch.compiler.load_cache_artifacts(made) is not None


def _cache_dir() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def _libraries() -> list[Path]:
    """Those that this process has loaded, and those by which torch has tried what the processor can do."""
    root = _cache_dir()
    loaded = [Path(file) for module in list(sys.modules.values()) if (file := _file_of(module)).endswith(".so")]
    mine = [file for file in loaded if file.is_relative_to(root)]
    if not mine:
        return []
    tried = [
        file
        for source in _newest_first(root.glob("??/*.cpp"))
        if _size(source) < _SMALL_BYTES and (library := source.with_suffix(".so")).is_file()
        for file in (source, library)
    ]
    return [file for file in (*mine, *tried) if _LIBRARY.fullmatch(f"{file.parent.name}/{file.name}")]


def _instructions() -> list[str]:
    """What torch has found the processor able to do; empty where it has not looked."""
    from torch._inductor import cpu_vec_isa

    looked = cpu_vec_isa.valid_vec_isa_list.cache_info().currsize
    return [str(one) for one in cpu_vec_isa.valid_vec_isa_list()] if looked else []


def _take_instructions(names: list[str]) -> None:
    """Spares torch trying each set of instructions in a process of its own, a second in all, where the same libraries
    ran on the same kind of processor."""
    from torch._inductor import config, cpu_vec_isa

    looked = cpu_vec_isa.valid_vec_isa_list.cache_info().currsize
    if not names or looked:
        return
    with config.patch({"cpp.vec_isa_ok": True}):
        found = [str(one) for one in cpu_vec_isa.valid_vec_isa_list()]
    if found != names:
        cpu_vec_isa.valid_vec_isa_list.cache_clear()


def _file_of(module: Any) -> str:
    found = vars(module).get("__file__") if hasattr(module, "__dict__") else None
    return found if isinstance(found, str) else ""


def _put(file: Path, data: bytes) -> None:
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.chmod(0o755)
    part.replace(file)


def _files(where: Path, key: str) -> list[Path]:
    return _newest_first(where.glob(f"{key}-*.zip"))


def _newest_first(files: Iterable[Path]) -> list[Path]:
    """Without those that another process has taken away meanwhile."""
    times: dict[Path, float] = {}
    for file in files:
        with contextlib.suppress(OSError):
            times[file] = file.stat().st_mtime
    return sorted(times, key=lambda file: -times[file])


def _size(file: Path) -> int:
    """Nothing where it has gone."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _tidy(where: Path, key: str, new: Path, names: set[str]) -> None:
    """Takes away what the new file has as well, and the oldest ones where all take too much."""
    for file in _files(where, key):
        with contextlib.suppress(*_UNREADABLE), zipfile.ZipFile(file) as archive:
            if file != new and set(json.loads(archive.read(_NAMES))) < names:
                file.unlink()
    room = MAX_FOLDER_BYTES
    for file in _newest_first(where.glob("*.zip")):
        room -= _size(file)
        if room < 0 and file != new:
            file.unlink(missing_ok=True)


def _why_not_ours(path: Path) -> str:
    """Why somebody else may have written there; empty where nobody may have."""
    if os.name != "posix":
        return ""
    found = path.stat()
    if found.st_uid != os.getuid():
        return "belongs to another user"
    return "others may write there" if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""
