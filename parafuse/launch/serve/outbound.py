"""Requests that the server itself sends, to hosts on a list and nowhere else: webhooks, and pictures by URL.

A name is resolved once; the addresses found are checked, and the connection goes to one of them, so that a name which
resolves to something else a moment later (DNS rebinding) leads nowhere. No redirects, no proxies of the environment.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

import httpx2

from parafuse.errors import ConfigError, ParafuseError

PORTS = {"http": 80, "https": 443}
LOCALHOST = "localhost"
NAT64 = ipaddress.ip_network("64:ff9b::/96")
MAX_URL_CHARACTERS = 2000

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> addresses. Raises OSError."""


class RefusedUrlError(ConfigError):
    """A URL that this server does not go to, whoever asks."""


class UnreachableError(ParafuseError):
    """A host that may be asked, and did not answer as it should."""


@dataclass(frozen=True)
class Place:
    """Where a URL leads, by its text alone."""

    url: httpx2.URL = field(repr=False)
    """May hold secrets in its query: never in logs."""
    host: str
    port: int


@dataclass(frozen=True)
class Target(Place):
    """The same, with the addresses that a connection may go to."""

    addresses: tuple[str, ...] = ()


def check_place(url: str, allowed_hosts: Sequence[str], what: str = "url") -> Place:
    """Whether a URL is on the list, without asking any name server: for the moment at which a request names it.

    `allowed_hosts`: names or addresses, exact. `example.org` allows ports 80 and 443 by the scheme; `example.org:8443`
    allows that port. `what`: the field's name, for the message. Raises RefusedUrlError."""
    if len(url) > MAX_URL_CHARACTERS:
        raise RefusedUrlError(f"{what}: {len(url)} characters; at most {MAX_URL_CHARACTERS} are taken.")
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise RefusedUrlError(f"{what}: is no URL; give one as https://HOST/PATH.") from error
    if parsed.scheme not in PORTS or not parsed.host:
        raise RefusedUrlError(f"{what}: must begin with http:// or https:// and name a host.")
    if parsed.userinfo:
        raise RefusedUrlError(f"{what}: holds a user or a password; leave them out.")
    host, port = _plain(parsed.raw_host.decode("ascii")), parsed.port or PORTS[parsed.scheme]
    if not any(_matches(one, host, port, parsed.scheme) for one in allowed_hosts):
        way_out = "allowed are: " + ", ".join(allowed_hosts) if allowed_hosts else "this server allows none"
        raise RefusedUrlError(f"{what}: {_shown(host)} port {port} is not allowed; {way_out}.")
    return Place(parsed, host, port)


async def check_url(
    url: str, allowed_hosts: Sequence[str], what: str = "url", *, resolve: Resolver | None = None
) -> Target:
    """The same, and where to connect to. Raises RefusedUrlError, also for a name that stands for an address inside of a
    network; UnreachableError where it has no address.

    Private and loopback addresses are gone to only where the list has that very address, or `localhost`."""
    place = check_place(url, allowed_hosts, what)
    address = _address(place.host)
    if address is not None:
        return Target(place.url, place.host, place.port, (str(address),))
    try:
        found = [ipaddress.ip_address(one) for one in await (resolve or _resolve)(place.host, place.port)]
    except (OSError, ValueError, UnicodeError) as error:
        raise UnreachableError(f"{what}: {_shown(place.host)} has no address.") from error
    if not found:
        raise UnreachableError(f"{what}: {_shown(place.host)} has no address.")
    # one address inside of a network is enough to refuse: which one is connected to must not be up to chance
    if not all(one.is_loopback if place.host == LOCALHOST else is_public(one) for one in found):
        raise RefusedUrlError(f"{what}: {_shown(place.host)} stands for an address that this server does not go to.")
    return Target(place.url, place.host, place.port, tuple(dict.fromkeys(str(one) for one in found)))


class PinnedTransport(httpx2.AsyncBaseTransport):
    """Connects to a target's checked addresses, in turn, and refuses to go anywhere else.

    The name stays in the Host header and in TLS, where the certificate is checked against it."""

    def __init__(self, target: Target, verify: ssl.SSLContext | bool = True):
        self.target = target
        self._inner = httpx2.AsyncHTTPTransport(verify=verify, trust_env=False)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        there = _plain(url.raw_host.decode("ascii")), url.port or PORTS.get(url.scheme, 0), url.scheme
        if there != (self.target.host, self.target.port, self.target.url.scheme):
            raise httpx2.UnsupportedProtocol(f"a connection for {self.target.host} was asked to go elsewhere")
        failed: httpx2.TransportError = httpx2.ConnectError("no address")
        for address in self.target.addresses:
            extensions = {**request.extensions, "sni_hostname": self.target.host}
            pinned = httpx2.Request(
                request.method, url.copy_with(host=address), headers=request.headers, stream=request.stream,
                extensions=extensions,
            )  # fmt: skip
            try:
                return await self._inner.handle_async_request(pinned)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:  # nothing was sent yet
                failed = error
        raise failed

    async def aclose(self) -> None:
        await self._inner.aclose()


def client_to(target: Target, timeout_s: float, verify: ssl.SSLContext | bool = True) -> httpx2.AsyncClient:
    """A client for this target alone. `timeout_s`: of each read and write; bound the whole with `asyncio.timeout`."""
    return httpx2.AsyncClient(
        transport=PinnedTransport(target, verify), timeout=timeout_s, follow_redirects=False, trust_env=False
    )


@functools.cache
def trusted() -> ssl.SSLContext:
    """The certificates that a host is checked against. Blocks for as long as it takes to read them, the first time."""
    return httpx2.create_ssl_context(trust_env=False)


async def fetch(
    url: str,
    allowed_hosts: Sequence[str],
    what: str = "url",
    *,
    max_bytes: int,
    timeout_s: float = 10.0,
    resolve: Resolver | None = None,
) -> bytes:
    """What a URL holds, at most so many bytes, as it was sent. Raises RefusedUrlError and UnreachableError, each with
    one line for the client that says nothing of what stands inside of a network."""
    verify = await asyncio.to_thread(trusted)  # not of the host's time
    try:
        async with asyncio.timeout(timeout_s):
            target = await check_url(url, allowed_hosts, what, resolve=resolve)
            async with client_to(target, timeout_s, verify) as client:
                return await _body(client, target, what, max_bytes)
    except TimeoutError as error:
        raise UnreachableError(f"{what}: the host did not answer within {timeout_s:g} s.") from error
    except httpx2.HTTPError as error:
        raise UnreachableError(f"{what}: the host cannot be reached ({type(error).__name__}).") from error


async def _body(client: httpx2.AsyncClient, target: Target, what: str, max_bytes: int) -> bytes:
    data = bytearray()
    # unpacked, a small answer could be any size
    async with client.stream("GET", target.url, headers={"accept-encoding": "identity"}) as answer:
        if answer.status_code != 200:
            raise UnreachableError(f"{what}: the host answered {answer.status_code}; it must answer 200, no redirect.")
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise UnreachableError(f"{what}: the host sent a packed answer; it must send it as it is.")
        async for piece in answer.aiter_raw():
            data += piece
            if len(data) > max_bytes:
                raise RefusedUrlError(f"{what}: it is larger than {max_bytes} bytes, the most that is taken.")
    return bytes(data)


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether it is an address of the open internet, also where an IPv6 address carries an IPv4 one."""
    if isinstance(address, IPv6Address):
        inside = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in NAT64:
            inside.append(IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(is_public(one) for one in inside if one is not None):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


async def _resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(one[4][0]) for one in found]


def _plain(host: str) -> str:
    """As hosts are compared: in lower case, without a final dot or brackets."""
    return host.lower().strip("[]").removesuffix(".")


def _matches(entry: str, host: str, port: int, scheme: str) -> bool:
    if _same(_plain(entry), host):
        return port == PORTS[scheme]
    name, colon, number = entry.rpartition(":")
    return bool(colon) and number == str(port) and _same(_plain(name), host)


def _same(one: str, other: str) -> bool:
    """Addresses by their value, names by their letters."""
    address = _address(one)
    return one == other if address is None else address == _address(other)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _shown(host: str) -> str:
    return f"host {host[:100]!r}"
