"""Pictures that requests bring, and videos, by the official client."""

from __future__ import annotations

import http.server
import io
import struct
import threading
import zlib
from collections.abc import Iterator

import openai
import pytest
from PIL import Image, PngImagePlugin

from parafuse.launch.serve.card import card_of
from parafuse.launch.serve.jobs import State
from tests.serve.http.serving import Running, png, serving, until

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")


class Pictures(http.server.BaseHTTPRequestHandler):
    """A host with pictures."""

    asked: list[str]

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        if self.path == "/elsewhere.png":
            self.send_response(302)
            self.send_header("location", "/a.png")
            self.end_headers()
            return
        data = png()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (Pictures,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"127.0.0.1:{found.server_port}", handler.asked
        found.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(host: tuple[str, list[str]]) -> Iterator[Running]:
    with serving(card_of("tiny:qwen-image-edit"), image_hosts=(host[0],), max_pixels=1_000_000) as running:
        yield running


@pytest.fixture(autouse=True)
def as_new(server: Running) -> Iterator[None]:
    server.behaviour.__init__()
    yield
    server.behaviour.__init__()


def kept(server: Running) -> list[str]:
    return [file.name for file in server.settings.inputs.iterdir()]


def test_an_edit(server: Running) -> None:
    server.behaviour.hold = True
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x010E] = "where I live"
    text.add_text("Comment", "where I live")
    out = io.BytesIO()
    Image.new("RGBA", (20, 10), (0, 255, 0, 255)).save(out, "PNG", exif=exif, pnginfo=text)
    got: list[openai.types.ImagesResponse] = []
    thread = threading.Thread(
        target=lambda: got.append(server.client().images.edit(prompt="a hat", image=out.getvalue()))
    )
    thread.start()
    job = until(lambda: server.behaviour.painted)[-1]
    (file,) = job.request.images["image"]
    data = (server.settings.inputs / file).read_bytes()
    assert b"where I live" in out.getvalue()
    assert b"where I live" not in data
    with Image.open(io.BytesIO(data)) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (20, 10))
        assert picture.getpixel((0, 0)) == (0, 255, 0)
    server.behaviour.hold = False
    thread.join(30)
    assert got[0].data


def test_several_pictures_and_a_stream(server: Running) -> None:
    events = list(
        server.client().images.edit(
            prompt="both", image=[png(), png(form="JPEG"), png(form="WEBP")], stream=True, partial_images=1
        )
    )
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_edit.completed"
    assert "image_edit.partial_image" in kinds
    assert len(server.behaviour.painted[-1].request.images["image"]) == 3


def test_a_mask_where_the_model_takes_none(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match=r"mask: the model .* takes none"):
        server.client().images.edit(prompt="x", image=png(), mask=png())
    assert not server.behaviour.painted


def test_a_mask() -> None:
    from dataclasses import replace

    card = card_of("tiny:qwen-image-edit")
    paints_in = replace(card, accepted=frozenset((card.accepted or frozenset()) | {"mask_image", "strength"}))
    with serving(paints_in) as server:
        mask = Image.new("RGBA", (4, 4), (9, 9, 9, 255))
        mask.putpixel((1, 2), (9, 9, 9, 0))
        out = io.BytesIO()
        mask.save(out, "PNG")
        server.behaviour.hold = True
        with server.http() as http:
            answer = http.post(
                "/v1/images/edits", data={"prompt": "x", "strength": "0.5", "background": "true"},
                files={"image": ("a.png", png((4, 4))), "mask": ("m.png", out.getvalue())},
            )  # fmt: skip
        assert answer.status_code == 202, answer.text
        request = server.wait(answer.json()["id"], State.RUNNING).request
        assert request.settings["strength"] == 0.5
        with Image.open(server.settings.inputs / request.images["mask_image"][0]) as found:
            assert found.mode == "L"
            assert (found.getpixel((1, 2)), found.getpixel((0, 0))) == (255, 0)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it has so many pixels, and has them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + name + data + struct.pack("!I", zlib.crc32(name + data))

    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    head = struct.pack("!IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cannot be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read"),
        (png()[:40], "cannot be read"),
        (png(form="GIF"), "cannot be read"),
        (png(form="TIFF"), "cannot be read"),
        (bomb(3_000, 3_000), "3000x3000 pixels; at most 1000000"),
        (bomb(40_000, 40_000), "too many pixels"),
    ],
    ids=["empty", "svg", "cut off", "gif", "tiff", "bomb", "larger bomb"],
)
def test_what_is_no_picture(server: Running, data: bytes, why: str) -> None:
    with pytest.raises(openai.BadRequestError, match=why):
        server.client().images.edit(prompt="x", image=data or ("a.png", b""))
    assert not server.behaviour.painted


def test_nothing_stays_of_a_request_that_is_refused(server: Running) -> None:
    before = kept(server)
    with pytest.raises(openai.BadRequestError, match="cannot be read"):
        server.client().images.edit(prompt="x", image=[png(), b"no picture"])
    server.behaviour.peak_bytes = 10**12
    with pytest.raises(openai.APIStatusError):
        server.client().images.edit(prompt="x", image=png())
    assert kept(server) == before


def test_an_idempotent_edit_by_its_pictures(server: Running) -> None:
    client, headers = server.client(), {"Idempotency-Key": "edit-1"}
    first = client.images.edit(prompt="x", image=png(), extra_headers=headers)
    again = client.images.edit(prompt="x", image=png(), extra_headers=headers)
    assert first.id == again.id  # type: ignore[attr-defined]
    with pytest.raises(openai.ConflictError):
        client.images.edit(prompt="x", image=png((17, 17)), extra_headers=headers)


def test_urls_of_listed_hosts_alone(server: Running, host: tuple[str, list[str]]) -> None:
    place, asked = host
    with server.http() as http:

        def ask(url: str) -> tuple[int, str]:
            answer = http.post(
                "/v1/images/edits", files={"prompt": (None, "x"), "image": (None, url), "background": (None, "true")}
            )
            return answer.status_code, answer.text

        assert ask(f"http://{place}/a.png")[0] == 202
        assert asked == ["/a.png"]
        for url in (
            f"http://localhost:{place.partition(':')[2]}/b.png",  # another name of the same
            "http://127.0.0.1/b.png",
            "http://169.254.169.254/latest/meta-data",
            "http://[::1]/b.png",
            "http://0x7f000001/b.png",
            "file:///etc/passwd",
            f"http://{place}@evil.example/b.png",
            f"http://user:pass@{place}/b.png",
            "data:image/png;base64,AAAA",
            "",
        ):
            status, text = ask(url)
            assert status == 400, (url, text)
        assert asked == ["/a.png"]
        assert "no redirect" in ask(f"http://{place}/elsewhere.png")[1]
        assert asked == ["/a.png", "/elsewhere.png"]


def test_videos() -> None:
    with serving(card_of("tiny:wan2.1-14b")) as server:
        client = server.client()
        with pytest.raises(openai.BadRequestError, match="makes videos"):
            client.images.generate(prompt="x")
        with pytest.raises(openai.BadRequestError, match="at most 512"):
            client.videos.create(prompt="x", seconds="120")  # type: ignore[arg-type]
        server.behaviour.hold = True
        video = client.videos.create(prompt="waves", seconds="4", size="1280x720", extra_body={"fps": 8})
        assert (video.object, video.size, video.seconds) == ("video", "1280x720", "4")
        server.wait(video.id, State.RUNNING)
        assert client.videos.retrieve(video.id).status == "in_progress"
        with pytest.raises(openai.ConflictError):
            client.videos.download_content(video.id)
        with pytest.raises(openai.NotFoundError):
            server.client(1).videos.retrieve(video.id)
        server.behaviour.hold = False
        assert client.videos.poll(video.id, poll_interval_ms=50).status == "completed"
        assert server.behaviour.painted[0].request.settings["num_frames"] == 33
        content = client.videos.download_content(video.id)
        assert content.response.headers["content-type"] == "video/mp4"
        assert b"ftyp" in content.read()
        second = client.videos.create(prompt="more", extra_body={"frames": 9})
        assert [one.id for one in client.videos.list(limit=1)] == [second.id, video.id]
        assert not list(server.client(1).videos.list())
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)
        server.behaviour.hold = True
        third = client.videos.create(prompt="not wanted")
        server.wait(third.id, State.RUNNING)
        assert client.videos.delete(third.id).deleted
        assert server.store.get(third.id) is None
