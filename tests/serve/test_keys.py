"""API keys: lines, files, headers, and servers that would be open."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Any

import msgspec
import pytest
from standardwebhooks.webhooks import Webhook

from parafuse.errors import ConfigError
from parafuse.launch.serve import keys as module
from parafuse.launch.serve.keys import ENVIRONMENT, LOCAL, Key, Keys, check_exposed, make_key
from parafuse.launch.serve.settings import Serving


def written(folder: Path, *lines: str) -> Path:
    file = folder / "keys.jsonl"
    file.write_text("\n".join(lines) + "\n")
    file.chmod(0o600)
    return file


def entry(**fields: Any) -> str:
    return msgspec.json.encode({"id": "k", "hash": "sha256:" + "a" * 64, **fields}).decode()


def test_a_key_that_was_made_opens_and_its_line_does_not_hold_it(tmp_path: Path) -> None:
    secret, line = make_key("shop")
    other, other_line = make_key()
    assert secret.startswith("pf_")
    assert len(secret) >= 46, "256 random bits"
    assert secret not in line
    assert secret[3:] not in line
    keys = Keys.load(written(tmp_path, "# comment", "", line, other_line), {})
    found = keys.owner_of(f"Bearer {secret}")
    assert found is not None
    assert (found.name, found.id[:4], found.hash) == (
        "shop",
        "key_",
        "sha256:" + hashlib.sha256(secret.encode()).hexdigest(),
    )
    assert keys.get(found.id) == found
    assert keys.get("key_none") is None
    second = keys.owner_of(f"bearer {other} ")
    assert second is not None
    assert second.id != found.id
    assert not keys.none_needed


def test_what_is_not_a_key_opens_nothing(tmp_path: Path) -> None:
    secret, line = make_key()
    keys = Keys.load(written(tmp_path, line), {})
    digest = Key(**msgspec.json.decode(line)).hash
    wrong = [f"Bearer {secret[:-1]}", f"Bearer {secret}a", f"Bearer {secret} {secret}", f"Bearer,{secret}"]
    wrong += [secret, f"Basic {secret}", f"Bearer\0{secret}", f"Bearer {digest}", f"Bearer {digest[7:]}"]
    for header in (None, "", "Bearer", "Bearer ", "Bearer ☃", "Bearer \udcff", "Bearer " + "a" * 10**6, *wrong):
        assert keys.owner_of(header) is None, header


def test_every_key_is_compared_whichever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make_key() for _ in range(5)]
    keys = Keys.load(written(tmp_path, *(line for _, line in made)), {})
    compared: list[bool] = []

    def spy(a: bytes, b: bytes) -> bool:
        compared.append(hmac.compare_digest(a, b))
        return compared[-1]

    class Spied:
        compare_digest = staticmethod(spy)

    monkeypatch.setattr(module, "hmac", Spied)
    for index, secret in enumerate([*(secret for secret, _ in made), "pf_wrong"]):
        compared.clear()
        assert (keys.owner_of(f"Bearer {secret}") is None) == (index == 5)
        assert compared == [index == place for place in range(5)]


def test_limits_of_a_line(tmp_path: Path) -> None:
    signing = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    limits = {"max_queued": 5, "max_running": 1, "rank_seconds_per_day": 3600, "priority_max": 0, "webhooks": True,
              "webhook_secret": signing}  # fmt: skip
    key = Keys.load(written(tmp_path, entry(**limits)), {}).get("k")
    assert {name: getattr(key, name) for name in limits} == limits
    plain = Key(id="k", hash="sha256:" + "a" * 64)
    assert (plain.max_queued, plain.max_running, plain.rank_seconds_per_day, plain.priority_max) == (
        None,
        None,
        None,
        10,
    )
    assert not plain.webhooks


def test_a_key_for_webhooks_has_a_secret_that_signs(tmp_path: Path) -> None:
    _, line = make_key(webhooks=True)
    key = Keys.load(written(tmp_path, line), {}).get(msgspec.json.decode(line)["id"])
    assert key is not None
    assert key.webhooks
    assert key.webhook_secret is not None
    Webhook(key.webhook_secret)
    with pytest.raises(ConfigError, match="serve-key: name: at most 100"):
        make_key("a\nb")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "is no JSON object"),
        ("[]", "Expected `object`, got `array`"),
        (entry(hash="a"), r"hash: sha256: and 64 digits 0-9a-f, never the key itself"),
        (entry(hash="sha256:" + "A" * 64), "hash: sha256: and 64"),
        (entry(hash="sha256:" + "a" * 64 + "\n"), "hash: sha256: and 64"),
        ('{"id": "k"}', "missing required field `hash`"),
        (entry(id=""), "id: 1 to 64"),
        (entry(id="../x"), "id: 1 to 64"),
        (entry(id=LOCAL), "is that of a server without keys"),
        (entry(name="a\nb"), "name: at most 100"),
        (entry(max_queue=5), "unknown field `max_queue`"),
        (entry(max_queued="5"), "Expected `int . null`, got `str` - at `.*max_queued`"),
        (entry(max_queued=-1), "max_queued -1: must be at least 0"),
        (entry(rank_seconds_per_day=-0.5), "rank_seconds_per_day -0.5: must be at least 0"),
        (entry(priority_max=11), "priority_max 11: from -10 to 10"),
        (entry(webhooks=True), "webhooks: needs webhook_secret"),
        (entry(webhook_secret="abc"), "webhook_secret: whsec_"),
        (entry(webhook_secret="whsec_!!!!"), "webhook_secret: whsec_"),
        (entry(webhook_secret="whsec_YWJj"), "webhook_secret: whsec_ and 24 to 64 bytes"),
    ],
)
def test_a_line_that_is_wrong_is_named_by_its_number(tmp_path: Path, line: str, fault: str) -> None:
    good = make_key()[1]
    with pytest.raises(ConfigError, match=rf"keys.jsonl, line 3: .*{fault}") as told:
        Keys.load(written(tmp_path, good, "# comment", line), {})
    assert "\n" not in str(told.value)
    with pytest.raises(ConfigError, match=rf"{ENVIRONMENT}, line 1: .*{fault}"):
        Keys.load(None, {ENVIRONMENT: line})


def test_a_secret_in_the_file_is_refused_and_not_shown(tmp_path: Path) -> None:
    secret, line = make_key()
    for wrong in (secret, f"name: {secret}", entry(hash=secret), line.replace('"id":"', f'"name":"{secret}","id":"')):
        with pytest.raises(ConfigError, match="line 1: holds a key itself") as told:
            Keys.load(written(tmp_path, wrong), {})
        assert secret not in str(told.value)


def test_two_lines_with_one_id_or_one_secret_are_refused(tmp_path: Path) -> None:
    line = make_key()[1]
    for twin, what in (
        (entry(id=msgspec.json.decode(line)["id"]), "id key_"),
        (line.replace("key_", "other_"), "its hash"),
    ):
        with pytest.raises(ConfigError, match=rf"line 2: {what}.*is that of line 1 too"):
            Keys.load(written(tmp_path, line, twin), {})


def test_files_that_are_missing_empty_or_open_to_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"--keys .*none: cannot be read .No such file"):
        Keys.load(tmp_path / "none", {})
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.load(tmp_path, {})
    with pytest.raises(ConfigError, match=r"holds no key .parafuse serve-key"):
        Keys.load(written(tmp_path, "# all gone"), {})
    with pytest.raises(ConfigError, match=f"{ENVIRONMENT}: holds no key"):
        Keys.load(None, {ENVIRONMENT: ""})
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is no UTF-8 text"):
        Keys.load(tmp_path / "binary", {})
    file = written(tmp_path, make_key()[1])
    Keys.load(file, {})
    assert capsys.readouterr().err == ""
    file.chmod(0o644)
    Keys.load(file, {})
    assert capsys.readouterr().err.count("others on this machine may read it; chmod 600 it") == 1
    file.chmod(0o666)
    with pytest.raises(ConfigError, match="anybody may write to it"):
        Keys.load(file, {})


def test_a_file_goes_before_the_environment(tmp_path: Path) -> None:
    (in_file, line), (in_environment, other) = make_key(), make_key()
    environ = {ENVIRONMENT: other}
    keys = Keys.load(written(tmp_path, line), environ)
    assert keys.owner_of(f"Bearer {in_file}")
    assert keys.owner_of(f"Bearer {in_environment}") is None
    assert Keys.load(None, environ).owner_of(f"Bearer {in_environment}")


def test_without_keys_everybody_is_local_on_the_loopback_address_alone() -> None:
    keys = Keys.load(None, {})
    assert keys.none_needed
    for header in (None, "Bearer anything"):
        owner = keys.owner_of(header)
        assert owner is not None
        assert owner.id == LOCAL
        assert keys.get(LOCAL) == owner
    assert keys.get("other") is None
    for host in ("127.0.0.1", "::1", "localhost"):
        check_exposed(Serving(host=host), keys)
    for host in ("0.0.0.0", "::", "192.168.1.2", "127.0.0.1.example", ""):
        with pytest.raises(ConfigError, match=r"others can reach it, and there are no keys. Give --keys"):
            check_exposed(Serving(host=host), keys)
        check_exposed(Serving(host=host), Keys.load(None, {ENVIRONMENT: make_key()[1]}))


def test_a_file_that_changes_is_read_again_and_a_broken_one_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (old, line), (new, new_line) = make_key(), make_key()
    file = written(tmp_path, line)
    keys = Keys.load(file, {})

    def opens(secret: str) -> bool:
        return keys.owner_of(f"Bearer {secret}") is not None

    assert opens(old)
    assert not opens(new)
    written(tmp_path, line, new_line)
    assert opens(old)
    assert opens(new)
    written(tmp_path, new_line, "{broken")
    assert all((opens(old), opens(new), opens(new)))
    told = capsys.readouterr().err
    assert told.count("line 2: is no JSON object") == told.count("The 2 keys from before stay.") == 1
    written(tmp_path, new_line)
    assert opens(new)
    assert not opens(old), "a key that was taken away opens no more"
    written(tmp_path, "# nothing")
    assert not keys.none_needed, "an emptied file opens nothing to everybody"
    assert opens(new)
    assert keys.owner_of(None) is None
    file.unlink()
    assert opens(new)
    assert opens(new)
    told = capsys.readouterr().err
    assert told.count("holds no key") == told.count("cannot be read") == 1
    (tmp_path / "new").mkdir()
    written(tmp_path / "new", line).replace(file)
    assert opens(old)
    assert not opens(new)
