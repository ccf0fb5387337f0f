"""Webhooks: what is sent, that OpenAI's client takes it, that it is tried again, and where it never goes."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import openai
import pytest
from standardwebhooks import Webhook

from parafuse.launch.serve import webhooks
from parafuse.launch.serve.jobs import Job, JobError, JobRequest
from parafuse.launch.serve.outbound import (
    RefusedUrlError,
    Target,
    UnreachableError,
    check_place,
    check_url,
    client_to,
    fetch,
    is_public,
)
from parafuse.launch.serve.sqlite_store import SqliteStore
from parafuse.launch.serve.webhooks import WAITS_S, WebhookSender, next_try_s, signed

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
PROMPT = "a secret apple"


class Host:
    """Answers each request with the next of its answers, the last one for ever; None: not at all."""

    def __init__(self, *answers: bytes | None):
        self.answers, self.got = list(answers), list[tuple[str, dict[str, str], bytes]]()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.got.append((first, headers, body))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if answer is None:
                await reader.read()  # until the other side goes
            else:
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def answer(status: int, body: bytes = b"", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\nconnection: close\r\n{headers}\r\n".encode() + body


OK = answer(200)


@asynccontextmanager
async def hosted(*answers: bytes | None, tls: ssl.SSLContext | None = None) -> AsyncIterator[Host]:
    host = Host(*answers)
    server = await asyncio.start_server(host.serve, "127.0.0.1", 0, ssl=tls)
    host.port = server.sockets[0].getsockname()[1]
    async with server:
        yield host


class Kept:
    """A store, and a clock that a test moves."""

    def __init__(self, folder: Path):
        self.now = time.time()
        self.store = SqliteStore(folder / "jobs", folder / "results", folder / "inputs", clock=lambda: self.now)
        self.epoch = self.store.begin_epoch()

    def ended(self, webhook: str | None, *, kind: str = "image", state: str = "done", owner: str = "anna") -> Job:
        request = JobRequest(kind=kind, prompt=PROMPT, seed=1)
        job = Job(id=f"job_{time.monotonic_ns()}", owner=owner, request=request, created_s=self.now, webhook=webhook)
        self.store.accept(job)
        if state == "cancelled":
            found = self.store.ask_cancel(job.id)
            assert found is not None
            return found
        self.store.claim([job.id], self.epoch)
        if state == "failed":
            return self.store.fail(job.id, self.epoch, JobError(kind="memory", message=PROMPT), keep_s=60)
        self.store.folders.output(job.id).mkdir()
        return self.store.commit(job.id, self.epoch, folder=job.id, files=(), receipt="{}", rank_seconds=1, keep_s=60)

    def sender(self, *allowed: str, secret: str | None = SECRET, **more: object) -> WebhookSender:
        return WebhookSender(self.store, allowed, lambda _: secret, clock=lambda: self.now, **more)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


def test_what_is_sent_is_taken_by_the_client_of_openai_and_holds_no_prompt(kept: Kept) -> None:
    async def main() -> list[tuple[str, dict[str, str], bytes]]:
        async with hosted(OK) as host:
            for kind, state in (("image", "done"), ("edit", "failed"), ("video", "done"), ("image", "cancelled")):
                kept.ended(f"http://127.0.0.1:{host.port}/hook?to=me", kind=kind, state=state)
            assert await kept.sender(f"127.0.0.1:{host.port}").deliver_due() == 4
            return host.got

    got = asyncio.run(main())
    client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
    kinds = set()
    for first, headers, body in got:
        assert first == "POST /hook?to=me HTTP/1.1"
        event = client.webhooks.unwrap(body, headers)
        assert set(json.loads(body)["data"]) == {"id"}
        assert PROMPT.encode() not in body
        kinds.add(event.type)
        Webhook(SECRET).verify(body, headers)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body.replace(b"job_", b"jab_"), headers)
    assert kinds == {
        "image.generation.completed", "image.edit.failed", "video.completed", "image.generation.cancelled"
    }  # fmt: skip
    assert len({headers["webhook-id"] for _, headers, _ in got}) == 4
    assert not kept.store.due_webhooks(kept.now + 1e6), "each once"


def test_a_try_that_fails_is_made_again_later_also_by_another_process(kept: Kept) -> None:
    async def main() -> list[tuple[str, dict[str, str], bytes]]:
        async with hosted(answer(500), answer(302, headers="location: http://127.0.0.1/\r\n"), OK) as host:
            kept.ended(f"http://127.0.0.1:{host.port}/")
            allowed = f"127.0.0.1:{host.port}"
            assert await kept.sender(allowed).deliver_due() == 1
            assert await kept.sender(allowed).deliver_due() == 0, "not yet"
            for wait in (WAITS_S[1], WAITS_S[2] - WAITS_S[1], 1e6):
                kept.now += wait + 0.01
                await kept.sender(allowed).deliver_due()
            return host.got

    got = asyncio.run(main())
    assert len(got) == 3, "twice again, and then never"
    assert len({headers["webhook-id"] for _, headers, _ in got}) == 1
    assert len({headers["webhook-timestamp"] for _, headers, _ in got}) > 1
    assert len({body for _, _, body in got}) == 1


def test_tries_grow_apart_and_end(kept: Kept) -> None:
    job = kept.ended("http://127.0.0.1/")
    ended, tries = job.finished_s, [kept.now]
    assert ended is not None
    while (following := next_try_s(job, tries[-1])) is not None:
        tries.append(following)
    assert [round(one - ended, 3) for one in tries] == list(WAITS_S)


@pytest.mark.parametrize("reply", [answer(410), None, b"nonsense\r\n\r\n"])
def test_hosts_that_want_nothing_say_nothing_or_speak_nonsense(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, reply: bytes | None
) -> None:
    if reply is None:
        monkeypatch.setattr(webhooks, "TIMEOUT_S", 0.3)

    async def main() -> None:
        async with hosted(reply) as host:
            kept.ended(f"http://127.0.0.1:{host.port}/")
            sender = kept.sender(f"127.0.0.1:{host.port}")
            assert await sender.deliver_due() == 1
            over = reply == answer(410)
            assert sender.sent == {"delivered": 0, "failed": 1, "given_up": int(over)}
            assert len(kept.store.due_webhooks(kept.now + 60)) == (0 if over else 1)

    asyncio.run(main())


def test_nothing_goes_to_a_host_that_is_no_longer_allowed_or_without_a_signature(kept: Kept) -> None:
    async def main() -> Host:
        async with hosted(OK) as host:
            kept.ended(f"http://127.0.0.1:{host.port}/")
            await kept.sender("other.example").deliver_due()
            kept.ended(f"http://127.0.0.1:{host.port}/")
            await kept.sender(f"127.0.0.1:{host.port}", secret=None).deliver_due()
            return host

    assert asyncio.run(main()).got == []
    assert not kept.store.due_webhooks(kept.now + 1e6)


def test_one_that_hangs_does_not_keep_back_others_and_the_task_ends_when_cancelled(kept: Kept) -> None:
    async def main() -> None:
        async with hosted(None) as slow, hosted(OK) as fast:
            kept.ended(f"http://127.0.0.1:{slow.port}/")
            kept.ended(f"http://127.0.0.1:{fast.port}/")
            sender = kept.sender(f"127.0.0.1:{slow.port}", f"127.0.0.1:{fast.port}")
            task = asyncio.create_task(sender.run())
            async with asyncio.timeout(8):
                while not (fast.got and slow.got):
                    await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()

    asyncio.run(main())


# where it may go


def resolver(*answers: Sequence[str]) -> Callable[[str, int], object]:
    left = list(answers)

    async def resolve(host: str, port: int) -> Sequence[str]:
        return left.pop(0)

    return resolve


def checked(url: str, *allowed: str, found: Sequence[str] = ("93.184.215.14",)) -> Target:
    return asyncio.run(check_url(url, allowed, "webhook_url", resolve=resolver(found)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://hooks.example/a", "hooks.example"),
        ("https://HOOKS.example./a", "hooks.example"),
        ("http://hooks.example/a", "hooks.example"),
        ("https://hooks.example:8443/", "hooks.example:8443"),
        ("http://[::1]:90/", "[::1]:90"),
        ("http://[0:0::1]/", "::1"),
        ("http://127.0.0.1/", "127.0.0.1"),
    ],
)
def test_hosts_on_the_list(url: str, allowed: str) -> None:
    assert checked(url, allowed).addresses


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example/",
        "https://hooks.example.evil.example/",
        "https://xhooks.example/",
        "https://hooks.example:22/",
        "https://hooks.example@evil.example/",
        "https://evil.example\\@hooks.example/",
        "https://me:you@hooks.example/",
        "https://evil.example#hooks.example",
        "ftp://hooks.example/",
        "file:///etc/passwd",
        "gopher://hooks.example/",
        "//hooks.example/",
        "hooks.example",
        "",
        "https://",
        "https://hooks.example:99999/",
        "https://hooks.example/\r\nhost: evil",
        "https://hooks.example/" + "a" * 3000,
        "http://127.0.0.1/",
        "http://2130706433/",
        "http://[::ffff:7f00:1]/",
    ],
)
def test_what_is_not_on_the_list_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(RefusedUrlError) as caught:
        check_place(url, ["hooks.example"], "webhook_url")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("webhook_url: ")
    with pytest.raises(RefusedUrlError, match=r"allows none|http|user|URL|characters"):
        check_place(url, [])


@pytest.mark.parametrize(
    "found",
    [
        ["127.0.0.1"], ["10.0.0.8"], ["169.254.169.254"], ["192.168.1.1"], ["172.20.0.1"], ["100.64.0.1"], ["0.0.0.0"],
        ["224.0.0.1"], ["255.255.255.255"], ["::1"], ["fe80::1"], ["fd00::1"], ["::ffff:127.0.0.1"],
        ["64:ff9b::a9fe:a9fe"], ["2002:7f00:1::"], ["93.184.215.14", "127.0.0.1"],
    ],
)  # fmt: skip
def test_names_of_addresses_inside_of_a_network_are_refused(found: list[str]) -> None:
    with pytest.raises(RefusedUrlError, match="does not go to") as caught:
        checked("https://hooks.example/", "hooks.example", found=found)
    assert not any(one in str(caught.value) for one in found), "what stands inside is nobody's business"


def test_localhost_is_gone_to_where_the_list_has_it() -> None:
    assert checked("http://localhost/", "localhost", found=["127.0.0.1", "::1"]).addresses == ("127.0.0.1", "::1")
    with pytest.raises(RefusedUrlError):
        checked("http://localhost/", "localhost", found=["10.0.0.1"])
    assert is_public(ipaddress.ip_address("2606:4700::1111"))
    assert is_public(ipaddress.ip_address("::ffff:8.8.8.8"))


def test_a_name_without_an_address() -> None:
    with pytest.raises(UnreachableError, match="no address"):
        checked("https://hooks.example/", "hooks.example", found=[])


def test_a_name_that_changes_its_address_after_it_was_checked_leads_nowhere_else() -> None:
    async def main() -> Host:
        async with hosted(OK) as host:
            resolve = resolver(["127.0.0.1"])  # asked again, it would fail
            url, allowed = f"http://localhost:{host.port}/", [f"localhost:{host.port}"]
            target = await check_url(url, allowed, resolve=resolve)  # pyright: ignore[reportArgumentType]
            async with client_to(target, 5) as client:
                assert (await client.get(target.url)).status_code == 200
                for other in (f"http://127.0.0.1:{host.port}/", f"http://localhost:{host.port + 1}/"):
                    with pytest.raises(httpx2.UnsupportedProtocol):
                        await client.get(other)
            return host

    host = asyncio.run(main())
    assert [headers["host"] for _, headers, _ in host.got] == [f"localhost:{host.port}"]


def test_the_next_address_is_taken_where_one_does_not_answer() -> None:
    async def main() -> int:
        async with hosted(OK) as host:
            url = httpx2.URL(f"http://hooks.example:{host.port}/")
            target = Target(url, "hooks.example", host.port, ("127.0.0.2", "127.0.0.1"))
            async with client_to(target, 5) as client:
                return (await client.post(url, content=b"x")).status_code

    assert asyncio.run(main()) == 200


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_a_certificate_is_checked_against_the_name_not_the_address(tmp_path: Path) -> None:
    name, key, certificate = "hooks.example", tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", certificate, "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(certificate, key)
    trusted = ssl.create_default_context(cafile=str(certificate))

    async def status(host: str, verify: ssl.SSLContext | bool) -> int:
        async with hosted(OK, tls=ours) as server:
            url = httpx2.URL(f"https://{host}:{server.port}/")
            async with client_to(Target(url, host, server.port, ("127.0.0.1",)), 5, verify) as client:
                return (await client.get(url)).status_code

    assert asyncio.run(status(name, trusted)) == 200
    for host, verify in (("other.example", trusted), (name, True)):
        with pytest.raises(httpx2.ConnectError, match=r"(?i)certificate"):
            asyncio.run(status(host, verify))


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (answer(302, headers="location: http://127.0.0.1/\r\n"), "answered 302"),
        (answer(200, b"x" * 200), "larger than 100 bytes"),
        (answer(200, b"x", "content-encoding: gzip\r\n"), "packed"),
        (None, "did not answer"),
        (b"nonsense\r\n\r\n", "cannot be reached"),
    ],
)
def test_what_is_fetched_is_bounded(reply: bytes | None, said: str) -> None:
    async def main() -> bytes:
        async with hosted(reply) as host:
            url, allowed = f"http://127.0.0.1:{host.port}/x.png", [f"127.0.0.1:{host.port}"]
            return await fetch(url, allowed, "image", max_bytes=100, timeout_s=0.5 if reply is None else 20)

    with pytest.raises((RefusedUrlError, UnreachableError), match=said):
        asyncio.run(main())


def test_what_is_fetched_comes_as_it_was_sent() -> None:
    async def main() -> bytes:
        async with hosted(answer(200, b"picture")) as host:
            return await fetch(f"http://127.0.0.1:{host.port}/", [f"127.0.0.1:{host.port}"], max_bytes=7)

    assert asyncio.run(main()) == b"picture"


def test_a_body_is_the_same_for_each_try(kept: Kept) -> None:
    job = kept.ended("http://127.0.0.1/")
    (one, first), (two, later) = signed(job, SECRET, 1000.9), signed(job, SECRET, 2000.0)
    assert one == two
    assert first["webhook-timestamp"] == "1000"
    assert first["webhook-id"] == later["webhook-id"]
    assert first["webhook-signature"] != later["webhook-signature"]
