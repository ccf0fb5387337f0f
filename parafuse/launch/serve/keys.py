"""API keys: who may use the server, and how much of it. Keys are kept as hashes, one JSON object a line.

A plain SHA-256 is enough: slow hashes are for passwords that people choose and that can be guessed. These secrets are
256 random bits, which nobody finds by trying, and a slow hash would let anyone keep the server busy with wrong keys.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
import stat
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from parafuse.errors import ConfigError
from parafuse.launch.serve.settings import Serving
from parafuse.log import note

ENVIRONMENT = "PARAFUSE_API_KEYS"
PREFIX = "pf_"
LOCAL = "local"
"""Owner of all jobs of a server without keys."""
MAKE = "parafuse serve-key writes such lines"
MAX_HEADER_CHARACTERS = 512
MAX_FILE_BYTES = 4 << 20
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_SECRET = re.compile(rf"{PREFIX}[A-Za-z0-9_-]{{20,}}")


class Key(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One key, as its line says. A limit that is not given is the server's own."""

    id: str
    """Owner of its jobs. A new secret under the same id keeps them."""
    name: str = ""
    """For people, logs and metrics."""
    hash: str
    """sha256: and the hex digest of the secret."""
    max_queued: int | None = None
    """Jobs that wait at most."""
    max_running: int | None = None
    """Jobs that run at once at most."""
    rank_seconds_per_day: float | None = None
    """Seconds times ranks from midnight UTC on; of GPUs, GPU-seconds."""
    priority_max: int = 10
    """The highest priority that its jobs may have, from -10 to 10."""
    webhooks: bool = False
    """Whether its jobs may name webhooks."""
    metrics: bool = False
    """Whether it may read /metrics, which tell of all keys."""
    webhook_secret: str | None = None
    """whsec_...: what its webhooks are signed with (standardwebhooks). The key's user has it too."""

    def __post_init__(self) -> None:
        """Raises ValueError; msgspec tells it as a fault of the line."""
        if not _ID.fullmatch(self.id):
            raise ValueError("id: 1 to 64 letters, digits, _ or -")
        if not _HASH.fullmatch(self.hash):
            raise ValueError("hash: sha256: and 64 digits 0-9a-f, never the key itself")
        if len(self.name) > 100 or not self.name.isprintable():
            raise ValueError("name: at most 100 printable characters")
        for name in ("max_queued", "max_running", "rank_seconds_per_day"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} {value}: must be at least 0")
        if not -10 <= self.priority_max <= 10:
            raise ValueError(f"priority_max {self.priority_max}: from -10 to 10")
        if self.webhook_secret is not None:
            _check_webhook_secret(self.webhook_secret)
        elif self.webhooks:
            raise ValueError("webhooks: needs webhook_secret, which signs them")


_LOCAL = Key(id=LOCAL, name=LOCAL, hash="sha256:" + "0" * 64, metrics=True)
"""Nobody is asked for it: no secret has this hash."""


def make_key(name: str = "", *, webhooks: bool = False, metrics: bool = False) -> tuple[str, str]:
    """A new key: its secret, which is shown once and kept by its user, and the line for the file of keys, without it.
    Limits are added to the line by hand. Raises ConfigError for a name that cannot be one."""
    secret = PREFIX + secrets.token_urlsafe(32)
    signing = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode() if webhooks else None
    try:
        key = Key(
            id=f"key_{secrets.token_hex(8)}", name=name, hash=_hash(secret), webhooks=webhooks, metrics=metrics,
            webhook_secret=signing,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"serve-key: {error}.") from error
    return secret, msgspec.json.encode(key).decode()


class Keys:
    """The keys of a server, read again when their file changes. Usable from several threads."""

    def __init__(self, keys: Sequence[Key], *, file: Path | None = None, seen: tuple[int, ...] = ()):
        """For `load`. `seen`: what the file looked like when it was read."""
        self._keys = tuple(keys)
        self._digests = tuple(bytes.fromhex(key.hash.removeprefix("sha256:")) for key in keys)
        self._file, self._seen = file, seen
        self._guard = threading.Lock()

    @classmethod
    def load(cls, file: Path | None, environ: Mapping[str, str]) -> Keys:
        """From a file, else from the environment's PARAFUSE_API_KEYS (the same lines), else none. Raises ConfigError
        with the line's number; lines are never shown, somebody may have put a secret there."""
        if file is not None:
            seen, keys = _read(file)
            return cls(keys, file=file, seen=seen)
        text = environ.get(ENVIRONMENT)
        return cls(()) if text is None else cls(_parsed(text, ENVIRONMENT))

    @property
    def none_needed(self) -> bool:
        """No keys were given: everybody is `local`. Never so once there were some."""
        return self._file is None and not self._keys

    def owner_of(self, authorization: str | None) -> Key | None:
        """The key of an Authorization header (`Bearer pf_...`); None where it is not one of ours. Takes the same time
        whether and whichever key it is."""
        if self.none_needed:
            return _LOCAL
        keys, digests = self._current()
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or len(secret) > MAX_HEADER_CHARACTERS:
            return None
        digest = hashlib.sha256(secret.strip().encode(errors="surrogatepass")).digest()
        found: Key | None = None
        for key, expected in zip(keys, digests, strict=True):  # all of them: where it is found must not show
            if hmac.compare_digest(digest, expected):
                found = key
        return found

    def get(self, owner: str) -> Key | None:
        """The key with this id: its limits, and what signs its webhooks. None where it was taken away."""
        if self.none_needed:
            return _LOCAL if owner == LOCAL else None
        return next((key for key in self._current()[0] if key.id == owner), None)

    def all(self) -> tuple[Key, ...]:
        """Those that there are now."""
        return self._current()[0]

    def _current(self) -> tuple[tuple[Key, ...], tuple[bytes, ...]]:
        with self._guard:
            if self._file is not None:
                self._look_again(self._file)
            return self._keys, self._digests

    def _look_again(self, file: Path) -> None:
        try:
            seen = _look(file)
        except OSError:
            seen = ()
        if seen == self._seen:
            return
        self._seen = seen  # told once, also where it cannot be read
        try:
            self._seen, keys = _read(file)
        except ConfigError as error:
            note(f"{error} The {len(self._keys)} keys from before stay.")
            return
        self._keys = tuple(keys)
        self._digests = tuple(bytes.fromhex(key.hash.removeprefix("sha256:")) for key in keys)


def check_exposed(settings: Serving, keys: Keys) -> None:
    """Raises ConfigError for a server that would be open to other machines without keys."""
    if keys.none_needed and not settings.is_local:
        raise ConfigError(
            f"--host {settings.host}: others can reach it, and there are no keys. Give --keys FILE or {ENVIRONMENT} "
            f"({MAKE}), or --host 127.0.0.1."
        )


def _hash(secret: str) -> str:
    return "sha256:" + hashlib.sha256(secret.encode()).hexdigest()


def _check_webhook_secret(secret: str) -> None:
    body = secret.removeprefix("whsec_")
    try:
        size = len(base64.b64decode(body, validate=True))
    except ValueError:
        size = 0
    if body == secret or not 24 <= size <= 64:
        raise ValueError("webhook_secret: whsec_ and 24 to 64 bytes in base64")


def _look(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _read(file: Path) -> tuple[tuple[int, ...], list[Key]]:
    """What the file looked like before it was read, and its keys."""
    try:
        seen = _look(file)
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            data = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--keys {file}: cannot be read ({error.strerror}).") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"--keys {file}: more than {MAX_FILE_BYTES >> 20} MiB; it is no file of keys.")
    if mode & stat.S_IWOTH:
        raise ConfigError(f"--keys {file}: anybody may write to it; chmod 600 it.")
    try:
        keys = _parsed(data.decode(), f"--keys {file}")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--keys {file}: is no UTF-8 text ({MAKE}).") from error
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        note(f"--keys {file}: others on this machine may read it; chmod 600 it.")
    return seen, keys


def _parsed(text: str, where: str) -> list[Key]:
    keys: list[Key] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        at = f"{where}, line {number}"
        key = _key(line, at)
        for value, told in ((key.id, f"id {key.id}"), (key.hash, "its hash")):
            if value in lines:
                raise ConfigError(f"{at}: {told} is that of line {lines[value]} too; each key has its own.")
            lines[value] = number
        keys.append(key)
    if not keys:
        raise ConfigError(f"{where}: holds no key ({MAKE}).")
    return keys


def _key(line: str, at: str) -> Key:
    if _SECRET.search(line):
        raise ConfigError(f"{at}: holds a key itself. Take it away, and put a line with its hash there ({MAKE}).")
    try:
        key = msgspec.json.decode(line, type=Key)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{at}: {error}.") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{at}: is no JSON object ({MAKE}).") from error
    if key.id == LOCAL:
        raise ConfigError(f"{at}: id {LOCAL} is that of a server without keys; take another.")
    return key
