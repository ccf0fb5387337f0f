"""The page at `/` in a real Chromium, used as its user would."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parafuse.launch.serve.card import card_of
from parafuse.launch.serve.http import page
from parafuse.launch.serve.jobs import Job, JobError, State
from parafuse.launch.serve.messages import Painted
from tests.serve.http.chromium import CONTROL, SHIFT, Browser, browsing
from tests.serve.http.serving import Running, png, serving, until

STATE = "document.getElementById('stage').dataset.state"
PICTURES = "[...document.querySelectorAll('#outputs img')].filter((one) => one.naturalWidth).length"
HTML = '<b id="made">bold</b><img src="x" onerror="window.hit = 1">'


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browsing() as found:
        if isinstance(found, str):
            pytest.skip(f"no browser here: {found}")
        yield found


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """As it is when new, and with nothing to complain of at the end."""
    chromium.call("Page.navigate", url="about:blank")
    chromium.resize(1200, 900)
    chromium.prefer("light")
    chromium.faults.clear()
    chromium.asked.clear()
    yield chromium
    assert not chromium.faults


@pytest.fixture
def server() -> Iterator[Running]:
    with serving(num_keys=0) as running:
        running.behaviour.ranks = painted
        yield running


def painted(job: Job, folder: Path) -> Painted:
    """What ranks write, with a receipt as theirs: colours are made from prompt and seed."""
    asked = job.request
    names = [f"0-{index}.{asked.format}" for index in range(asked.num_outputs)]
    for index, name in enumerate(names):
        colour = tuple(hash((asked.prompt, asked.seed + index, part)) % 256 for part in range(3))
        (folder / name).write_bytes(b"\0\0\0\x18ftypmp42" if asked.format == "mp4" else png((32, 32), colour))
    texts = {"prompt": asked.prompt, "negative_prompt": asked.negative_prompt}
    lora = [{"name": one.name, "scale": one.scale, "sha256": "0"} for one in asked.lora]
    receipt = {"seed": asked.seed, "call": asked.settings | texts, "lora": lora}
    return Painted(call="c", files=(tuple(names),), receipt=json.dumps(receipt), seconds=0.1)


def opened(browser: Browser, server: Running) -> None:
    """With the form ready."""
    browser.open(f"{server.base}/")
    browser.until("document.activeElement.id === 'prompt'")


def watched(server: Running) -> Job:
    """The job that is running, once the page hears of it."""
    supervisor = server.app.state.service.supervisor
    return until(lambda: (jobs := server.behaviour.painted) and jobs[-1].id in supervisor._watches and jobs[-1])


def paint(browser: Browser, prompt: str) -> None:
    browser.fill("#prompt", prompt)
    browser.press("Enter", CONTROL)


def test_a_picture_with_previews_and_the_same_again(browser: Browser, server: Running) -> None:
    server.behaviour.gate = 0
    opened(browser, server)
    browser.fill("#seed", "7")
    browser.fill("#n", "2")
    browser.fill("#negative_prompt", "rain")
    paint(browser, "a red apple")
    watched(server)
    seen = list[str]()
    for gate in range(1, 4):
        server.behaviour.gate = gate
        browser.until(f"document.getElementById('how').innerText === 'Step {gate} of 4'")
        seen.append(browser.until("document.querySelector('#preview img')?.naturalWidth && "
                                  "document.querySelector('#preview img').alt"))  # fmt: skip
        assert browser.js("document.getElementById('progress').value") == gate / 4
    assert seen == ["Preview after step 1", "Preview after step 2", "Preview after step 3"]
    server.behaviour.gate = None
    browser.until(f"{PICTURES} === 2")
    assert browser.text("#outputs li:nth-child(2) figcaption").startswith("Seed 8")
    assert browser.text("#stage-prompt") == "a red apple"
    assert not browser.js("document.querySelector('#preview img')")
    browser.click("#receipt summary")
    assert json.loads(browser.text("#receipt-text"))["call"]["negative_prompt"] == "rain"
    browser.click("#jobs button[aria-label='Again with seed 7: a red apple']")
    browser.until("document.querySelectorAll('#jobs [data-status=done]').length === 2")
    first, second = server.behaviour.painted
    assert first.id != second.id
    asked, again = ({**one.request.asked} for one in (first.request and first, second.request and second))
    assert (again["model"], asked["model"]) == ("emoji", "emoji")
    for name in ("prompt", "negative_prompt", "seed", "num_outputs", "settings", "lora"):
        assert getattr(first.request, name) == getattr(second.request, name), name
    assert first.request.settings["num_inference_steps"] == 20
    browser.until(f"{PICTURES} === 2")


@pytest.mark.parametrize("how", ["running", "queued"])
def test_cancel(browser: Browser, server: Running, how: str) -> None:
    if how == "running":
        server.behaviour.gate = 2
    else:
        server.pause()
    opened(browser, server)
    paint(browser, "not for long")
    browser.until(f"{STATE} === '{how}' && document.querySelector('#jobs [data-status]')")
    if how == "running":
        watched(server)
        browser.press("Escape")
    else:
        browser.click("#cancel")
    browser.until(f"{STATE} === 'cancelled' && document.querySelector('#jobs [data-status=cancelled]')")
    (job,) = server.store.of_owner("local")
    assert job.state is State.CANCELLED
    browser.until("document.getElementById('stage-prompt').innerText === 'not for long'")
    server.behaviour.gate, server.behaviour.claim = None, True
    browser.click("#again")
    browser.until(f"{STATE} === 'done'")
    assert [one.request.seed for one in server.store.of_owner("local")] == [job.request.seed] * 2


def test_a_reload_neither_loses_nor_cancels(browser: Browser, server: Running) -> None:
    server.behaviour.gate = 1
    opened(browser, server)
    paint(browser, "slowly")
    job = watched(server)
    browser.reload()
    browser.until(f"{STATE} === 'running'")
    supervisor = server.app.state.service.supervisor
    until(lambda: len(supervisor._watches.get(job.id, ())) == 1)
    server.behaviour.gate = 3
    browser.until("document.getElementById('how').innerText === 'Step 3 of 4'")
    assert browser.text("#stage-prompt") == "slowly"
    server.behaviour.gate = None
    browser.until(f"{PICTURES} === 1")
    assert [one.id for one in server.behaviour.painted] == [job.id]


def test_the_key_is_asked_for(browser: Browser) -> None:
    with serving() as server:
        server.behaviour.ranks = painted
        browser.open(f"{server.base}/")
        browser.until("document.activeElement.id === 'key'")
        assert "needs a key" in browser.text("#door")
        assert browser.js("document.getElementById('studio').hidden && document.getElementById('key-wrong').hidden")
        browser.type("pf_wrong")
        browser.press("Enter")
        browser.until("document.getElementById('key-wrong').innerText === 'The server does not know this key.'")
        browser.fill("#key", server.secrets[1])
        browser.press("Enter")
        browser.until("document.activeElement.id === 'prompt'")
        paint(browser, "with a key")
        browser.until(f"{PICTURES} === 1")
        owner = server.app.state.service.keys.owner_of(f"Bearer {server.secrets[1]}")
        assert [one.owner for one in server.behaviour.painted] == [owner.id]
        browser.reload()
        browser.until(f"{PICTURES} === 1")
        kept = [browser.js(f"JSON.stringify({{...{where}}})") for where in ("localStorage", "sessionStorage")]
        assert kept[0] == "{}"
        assert server.secrets[1] in kept[1]
        assert browser.js("document.cookie") == ""
        assert not [url for url in browser.asked if server.secrets[1] in url]
        assert not [url for url in browser.asked if not url.startswith((server.base, "blob:", "about:"))]
        browser.click("#forget")
        browser.until("document.activeElement.id === 'key'")
        assert browser.js("sessionStorage.length") == 0
    assert [fault for fault in browser.faults if "401" not in fault] == []
    browser.faults.clear()


def test_words_are_never_html(browser: Browser, server: Running) -> None:
    opened(browser, server)
    paint(browser, HTML)
    browser.until(f"{PICTURES} === 1")
    server.behaviour.ranks, server.behaviour.fail = None, JobError(kind="memory", message=HTML)
    paint(browser, HTML)
    browser.until(f"{STATE} === 'failed'")
    assert browser.text("#how") == HTML
    browser.until(f"document.querySelectorAll('#jobs strong')[1].innerText === {json.dumps(HTML)}")
    assert browser.text("#stage-prompt") == HTML
    assert browser.js("[document.getElementById('made'), window.hit]") in ([None, None], [None])


@pytest.mark.parametrize("is_told", [True, False])
def test_what_the_browser_is_told_holds(browser: Browser, monkeypatch: pytest.MonkeyPatch, is_told: bool) -> None:
    """False: control; without the header it would all be done."""
    if not is_told:
        monkeypatch.delitem(page.SECURE, "content-security-policy")
    with serving(num_keys=0) as server, serving(num_keys=0) as other:
        opened(browser, server)
        made = (
            "(() => { try { document.body.insertAdjacentHTML('beforeend', '<img src=x: onerror=\"window.hit = 1\">');"
            "return 'made' } catch (error) { return error.name } })()"
        )
        assert browser.js(made) == ("TypeError" if is_told else "made")
        sent = f"fetch('{other.base}/health/live', {{mode: 'no-cors'}}).then(() => 'sent', () => 'kept')"
        assert browser.js(sent) == ("kept" if is_told else "sent")
        if not is_told:
            browser.until("window.hit === 1")
        browser.js("(() => { const one = document.createElement('iframe'); one.src = '/'; one.id = 'framed';"
                   "document.body.append(one); })()")  # fmt: skip
        assert browser.js("document.getElementById('framed').contentDocument?.getElementById('ask') ?? null") is None
    browser.faults.clear()  # the browser says what it has refused


def test_what_is_wrong_is_said_beside_its_field(browser: Browser, server: Running) -> None:
    opened(browser, server)
    browser.fill("#width", "63")
    browser.fill("#height", "64")
    paint(browser, "x")
    browser.until("document.getElementById('size-wrong').innerText.startsWith('size: ')")
    assert browser.js("document.activeElement.id") == "width"
    assert browser.js("document.activeElement.getAttribute('aria-invalid')") == "true"
    browser.fill("#width", "64")
    assert browser.js("document.getElementById('size-wrong').hidden")
    browser.fill("#seed", "1e")
    paint(browser, "x")
    assert "must be a number" in browser.text("#seed-wrong")
    browser.fill("#seed", "1")
    server.behaviour.peak_bytes = 10**10
    paint(browser, "x")
    browser.until("document.getElementById('ask-wrong').innerText.includes('10.0 GB')")
    server.behaviour.peak_bytes = None
    paint(browser, "")
    browser.until(f"{STATE} === 'done'")
    assert server.behaviour.painted[0].request.settings["width"] == 64
    assert len(browser.faults) == 2, "the two that were refused"
    browser.faults.clear()


def test_what_a_model_does_not_take_is_not_offered(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "thin lines.safetensors").write_bytes(b"x")
    whole = card_of("emoji", loras=str(tmp_path))
    card = dataclasses.replace(whole, accepted=(whole.accepted or frozenset()) - {"negative_prompt"}, guidance=None)
    with serving(card, num_keys=0) as server:
        server.behaviour.ranks = painted
        opened(browser, server)
        shown = browser.js("[...document.querySelectorAll('.field')].filter((one) => one.offsetHeight)"
                           ".map((one) => one.dataset.field)")  # fmt: skip
        assert shown == ["prompt", "size", "steps", "seed", "n", "lora"]
        assert browser.js("document.getElementById('steps').placeholder") == "20"
        browser.click("#loras label")
        browser.fill("#loras input[aria-label='Strength of thin lines']", "0.5")
        paint(browser, "drawn")
        browser.until(f"{PICTURES} === 1")
        browser.click("#loras label")
        browser.click("#again")
        browser.until("document.querySelectorAll('#jobs [data-status=done]').length === 2")
        said = [[(lora.name, lora.scale) for lora in one.request.lora] for one in server.behaviour.painted]
        assert said == [[("thin lines", 0.5)]] * 2


def test_videos(browser: Browser) -> None:
    with serving("tiny:wan2.1-14b", num_keys=0) as server:
        server.behaviour.ranks = painted
        opened(browser, server)
        assert not browser.js("document.getElementById('n').offsetHeight")
        browser.fill("#frames", "5")
        browser.fill("#fps", "8")
        paint(browser, "waves")
        browser.until("document.querySelector('#outputs video')?.src.startsWith('blob:')")
        browser.until("!document.getElementById('again').disabled")
        browser.fill("#fps", "9")
        browser.click("#again")
        browser.until("document.querySelectorAll('#jobs [data-status=done]').length === 2")
        said = [(one.request.settings["num_frames"], one.request.frames_per_second) for one in server.behaviour.painted]
        assert said == [(5, 8)] * 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window(browser: Browser, server: Running, scheme: str) -> None:
    browser.resize(360, 640)
    browser.prefer(scheme)
    opened(browser, server)
    paint(browser, "w" * 300)
    browser.until(f"{PICTURES} === 1")
    browser.click("#jobs .card")
    browser.until("document.querySelector('#jobs .thumb img')")
    browser.click("#receipt summary")
    width = browser.js("document.documentElement.clientWidth")  # without a scrollbar
    assert browser.js("document.documentElement.scrollWidth") == width <= 360
    out = "[...document.querySelectorAll('main *:not(pre)')]"
    out += f".filter((one) => one.getBoundingClientRect().right > {width})"
    assert browser.js(f"{out}.map((one) => one.id || one.tagName)") == []
    ground = browser.js("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(244, 245, 248)", "dark": "rgb(20, 22, 28)"}[scheme]


def test_by_keyboard_alone(browser: Browser, server: Running) -> None:
    opened(browser, server)
    browser.type("one")
    browser.press("Enter", CONTROL)
    browser.until(f"{PICTURES} === 1")
    browser.press("Tab", SHIFT)
    browser.js("document.getElementById('prompt').focus()")
    browser.press("Enter", CONTROL)
    browser.until("document.querySelectorAll('#jobs [data-status=done]').length === 2")
    browser.until("document.querySelectorAll('#jobs li > button:not([hidden])').length === 4")
    reached = tabbed(browser)
    visible = browser.js("[...document.querySelectorAll('main button, main input, main textarea, main a, summary')]"
                         ".filter((one) => one.offsetHeight && !one.disabled).length")  # fmt: skip
    assert len(reached) >= visible
    assert not [one for one in reached if not one["outline"]], "what has the focus is seen"
    cards = [one["place"] for one in reached if one["card"]]
    assert len(cards) == 2
    browser.js("document.getElementById('history').scrollIntoView()")
    go_to(browser, "document.activeElement === document.querySelector('#jobs li:last-child .card')")
    browser.press("Enter")
    browser.until("document.querySelector('#jobs li:last-child .card').getAttribute('aria-current') === 'true'")
    first = server.store.of_owner("local")[1]
    browser.until(f"document.getElementById('how').innerText.startsWith('Seed {first.request.seed},')")
    go_to(browser, "document.activeElement.id === 'remove'")
    browser.press(" ")
    until(lambda: len(server.store.of_owner("local")) == 1)
    browser.until("document.activeElement.className === 'card'")
    nameless = [role for role, name in browser.named() if not name.strip()]
    assert [role for role in nameless if role != "image"] == []


def tabbed(browser: Browser) -> list[dict[str, Any]]:
    """What Tab goes to, from the first to the last."""
    browser.js("document.getElementById('prompt').focus()")
    found = list[dict[str, Any]]()
    look = (
        "(() => { const one = document.activeElement; window.seen ??= []; if (one === document.body) return null;"
        "if (seen.includes(one)) return null; seen.push(one);"
        "return {place: seen.length, card: one.className === 'card',"
        "outline: getComputedStyle(one).outlineStyle === 'solid'}; })()"
    )
    while (one := browser.js(look)) is not None:
        found.append(one)
        browser.press("Tab")
    return found


def go_to(browser: Browser, reached: str) -> None:
    """By Tab alone."""
    for _ in range(60):
        if browser.js(reached):
            return
        browser.press("Tab")
    raise AssertionError(f"Tab does not go there: {reached}")
