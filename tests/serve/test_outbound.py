"""What the server fetches: how its certificates are read. Where it goes, and never goes, is in test_webhooks."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator

import httpcore2
import pytest

from parafuse.launch.serve import outbound
from tests.serve.test_webhooks import answer, hosted


@pytest.fixture
def nothing_read() -> Iterator[None]:
    outbound.trusted.cache_clear()
    yield
    outbound.trusted.cache_clear()


@pytest.mark.usefixtures("nothing_read")
def test_certificates_are_read_once_and_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    readers, read = list[threading.Thread](), httpcore2.default_ssl_context

    def counted(*, _trust_env: bool = True) -> ssl.SSLContext:
        assert not _trust_env
        readers.append(threading.current_thread())
        return read(_trust_env=_trust_env)

    monkeypatch.setattr(httpcore2, "default_ssl_context", counted)

    async def main() -> list[bytes]:
        async with hosted(answer(200, b"picture")) as host:
            url, allowed = f"http://127.0.0.1:{host.port}/", [f"127.0.0.1:{host.port}"]
            return [await outbound.fetch(url, allowed, max_bytes=7) for _ in range(3)]

    assert asyncio.run(main()) == [b"picture"] * 3
    assert len(readers) == 1
    assert readers[0] is not threading.current_thread()


@pytest.mark.usefixtures("nothing_read")
def test_a_fetch_over_tls_checks_certificates() -> None:
    context = outbound.trusted()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.cert_store_stats()["x509_ca"]
