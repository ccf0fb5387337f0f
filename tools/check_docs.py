"""Checks what a linter does not see: links, sizes, commands named in the README, and where benchmarks reach.

`python tools/check_docs.py` prints every fault as `file: fault` and ends with 1 when there is one.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SKIP = {"out", "build", "dist", "node_modules"}  # only at the top; hidden folders anywhere
MAX_FILE_LINES, MAX_MEDIAN_LINES, MAX_FUNCTION_LINES = 500, 200, 60
TEXT = {".md", ".py", ".toml", ".txt", ".yaml", ".yml", ".json", ""}  # "": Makefile, .ci/run
LINK = re.compile(
    r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|<(?:img|source)[^>]*\ssrc=\"([^\"]+)\"|^\[[^\]]+\]:\s+(\S+)", re.M
)
# A reader has this repository only: `#12` and folders of somebody's machine mean nothing to them.
FOREIGN = re.compile(
    r"(?<![\w&/\"'`(\[])#\d{1,4}\b(?![\"'`-])|\b(?:issue|ticket|pull request|PR)s? #?\d+\b|/wor[k]/|\.\./shared\b", re.I
)


def files() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts[:-1])
        if path.is_file() and parts[0] not in SKIP and not hidden and parts[-2:-1] != ("__pycache__",):
            yield path


def check_links(path: Path, text: str) -> Iterator[str]:
    for match in LINK.finditer(re.sub(r"```.*?```", "", text, flags=re.S)):
        target = next(group for group in match.groups() if group)
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        if not (path.parent / target.split("#")[0]).exists():
            yield f"link to {target!r}, which does not exist"


def check_sizes(path: Path, text: str) -> Iterator[str]:
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{lines} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.body[0].lineno + 1
            if ast.get_docstring(node):
                length -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.name}: a body of {length} lines, at most {MAX_FUNCTION_LINES}"


def public_names() -> list[str]:
    """`__all__` of the package, read without importing it."""
    for node in ast.parse((ROOT / "parafuse/__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    raise SystemExit("parafuse/__init__.py has no __all__")


def check_public(text: str) -> Iterator[str]:
    """Benchmarks and examples do what a user can do: `parafuse` and the names in its `__all__`."""
    public = {*public_names(), "__version__", "__file__"}
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("parafuse.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "parafuse":
            inner = node.module != "parafuse"
            names = [f"{node.module}.{alias.name}" for alias in node.names if inner or alias.name not in public]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "parafuse":
            names = [] if node.attr in public else [f"parafuse.{node.attr}"]
        yield from (f"uses {name}, which is not public" for name in names)


def shell_lines(text: str) -> Iterator[str]:
    """Lines of the code blocks that are not of another language, and inline code."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.S | re.M):
        if language in ("", "sh", "bash", "shell", "console"):
            yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def check_commands(text: str) -> Iterator[str]:
    """`make X` and `parafuse X` of the README exist."""
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.M))
    made: set[str] = set()
    commands: set[str] = set()
    for line in shell_lines(text):
        made.update(re.findall(r"(?:^|[\s;&])make ((?:[a-z][a-z-]*)(?: [a-z][a-z-]*)*)", line.split("#")[0]))
        commands.update(re.findall(r"(?:^|[\s;&/])parafuse ([a-z][a-z-]*)", line.split("#")[0]))
    for name in sorted({word for words in made for word in words.split()} - targets):
        yield f"`make {name}`: the Makefile has no such target"
    for name in sorted(commands):
        run = subprocess.run(
            [sys.executable, "-m", "parafuse", name, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if run.returncode != 0:
            yield f"`parafuse {name}`: `parafuse {name} --help` ends with {run.returncode}"


def check_text(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if match := FOREIGN.search(line):
            yield f"line {number}: {match[0].strip()!r} means nothing to a reader of this repository"
    if path.suffix == ".md":
        yield from check_links(path, text)
    if path.suffix == ".py":
        yield from check_sizes(path, text)
        if path.relative_to(ROOT).parts[0] in ("benchmarks", "examples"):
            yield from check_public(text)
    if path == ROOT / "README.md":
        yield from check_commands(text)


def main() -> int:
    faults: list[str] = []
    lengths: list[int] = []
    for path in files():
        if path.suffix not in TEXT or path.name == "LICENSE" or path.stat().st_size > 1_000_000:
            continue
        if path.suffix == ".json" and "models" in path.parts:
            continue  # a model's own files, tokenizers among them
        text = path.read_text(encoding="utf-8")
        faults += [f"{path.relative_to(ROOT)}: {fault}" for fault in check_text(path, text)]
        if path.suffix == ".py" and text.strip():
            lengths.append(len(text.splitlines()))
    median = statistics.median(lengths)
    if median >= MAX_MEDIAN_LINES:
        faults.append(f"all .py: the median is {median:g} lines; it must be under {MAX_MEDIAN_LINES}")
    print(*faults, sep="\n", end="\n" if faults else "")
    print(f"docs: {len(faults)} faults; {len(lengths)} Python files, median {median:g} lines, longest {max(lengths)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
