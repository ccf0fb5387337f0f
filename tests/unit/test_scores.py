"""`parafuse score`: figures with known values, the order of prompts, and a line for each wrong input."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from parafuse.errors import ConfigError, ModelError
from parafuse.launch import cli
from parafuse.launch.bench.fidelity import SAME_DB, lacks_lpips
from parafuse.launch.score import scores
from parafuse.launch.score.clip import Clip, clip_scores, directions
from parafuse.launch.score.command import Scoring, prepare, run
from parafuse.launch.score.judge import judge
from parafuse.launch.score.scores import frechet_distance

PROMPTS = ["a cat", "two red dogs", "the sea"]


def folder(path: Path, *, seed: int = 0, names: str = "a.png b.jpg c.webp", shift: int = 0, side: int = 40) -> str:
    """Random pictures; `shift` is added to each value."""
    path.mkdir(exist_ok=True)
    values = np.random.default_rng(seed)
    for name in names.split():
        picture = values.integers(0, 200, (side, side + 8, 3)) + shift
        options: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
        Image.fromarray(picture.astype(np.uint8)).save(path / name, **options)
    return str(path)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random CLIP model whose tokens are letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", *letters, *(letter + "</w>" for letter in letters), "<|endoftext|>"]
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    last = len(tokens) - 1
    text = dict(vocab_size=len(tokens), max_position_embeddings=16, bos_token_id=0, eos_token_id=last, **size)
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=dict(image_size=32, patch_size=8, **size), projection_dim=16)
    )
    path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(path)
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=pixels, tokenizer=tokenizer).save_pretrained(path)
    return str(path)


def lines(path: Path, prompts: list[str]) -> str:
    path.write_text("\n".join(prompts) + "\n")
    return str(path)


def card_of(where: str, **options: Any) -> Any:
    return judge(prepare(where, Scoring(**options)))


# Known values


def test_the_same_folders(tmp_path: Path, clip_folder: str) -> None:
    one, other = (folder(tmp_path / name, seed=3) for name in ("one", "other"))
    found = card_of(one, against=other, clip=clip_folder).metrics()
    assert found["psnr_db"]["worst"] == SAME_DB
    assert found["ssim"]["worst"] == pytest.approx(1.0, abs=1e-5)
    assert found["largest_of_255"]["worst"] == 0
    assert found["fid_on_clip_features"]["value"] == pytest.approx(0.0, abs=1e-6)


def test_a_known_shift_and_the_worst_file(tmp_path: Path) -> None:
    """51 of 255 everywhere is 0.2, which is 13.98 dB; in one file of three."""
    one = folder(tmp_path / "one", names="a.png c.png")
    other = folder(tmp_path / "other", names="a.png c.png")
    folder(tmp_path / "one", names="b.png", seed=5, shift=51)
    folder(tmp_path / "other", names="b.png", seed=5)
    found = card_of(one, against=other).metrics()["psnr_db"]
    assert found["worst"] == pytest.approx(13.979, abs=1e-3)
    assert found["worst_files"][0] == "b.png"
    assert found["mean"] == pytest.approx((13.979 + 2 * SAME_DB) / 3, abs=1e-3)


def test_frechet_distance_of_gaussians_by_hand() -> None:
    """Independent features: (m - m')^2 + (s - s')^2 for each."""
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).double() * (3 / 4) ** 0.5  # variance 1, unbiased
    want = corners * torch.tensor([2.0, 3.0])
    found = corners * torch.tensor([5.0, 7.0]) + torch.tensor([1.0, -4.0])
    assert frechet_distance(found, want) == pytest.approx(1 + 16 + 9 + 16, rel=1e-9)
    assert frechet_distance(found, found) == pytest.approx(0.0, abs=1e-6)


def test_directions_of_crafted_features() -> None:
    """Equal changes 1, opposite ones -1, across each other 0; lengths do not matter."""
    axis = torch.eye(3)
    before, after = axis[[0, 0, 0]], axis[[1, 1, 1]] * 7
    prompts_before, prompts_after = axis[[0, 1, 0]] * 3, axis[[1, 0, 0]] + torch.tensor([[0.0], [0], [1]]) * axis[2]
    found = directions(before, after, prompts_before, prompts_after)
    assert found[:2] == pytest.approx([1.0, -1.0])
    change = normalize(axis[0] + axis[2], dim=-1) - axis[0]
    assert found[2] == pytest.approx(float(torch.cosine_similarity(axis[1] - axis[0], change, dim=0)), abs=1e-6)
    assert directions(before, before, prompts_before, prompts_after) == [0, 0, 0]


def test_clip_score_is_the_cosine_by_hand(tmp_path: Path, clip_folder: str) -> None:
    """Against the model's own logits, which are cosines times its scale."""
    from transformers import AutoProcessor, CLIPModel

    one = folder(tmp_path / "one")
    card = card_of(one, clip=clip_folder, prompts=lines(tmp_path / "p.txt", PROMPTS))
    model: Any = CLIPModel.from_pretrained(clip_folder)
    processor: Any = AutoProcessor.from_pretrained(clip_folder, backend="pil")
    for (name, figures), prompt in zip(card.files.items(), PROMPTS, strict=True):
        image = Image.open(tmp_path / "one" / name).convert("RGB")
        with torch.no_grad():
            out = model(**processor(text=[prompt], images=[image], return_tensors="pt"))
            cosine = float(out.logits_per_image / model.logit_scale.exp())
        assert figures["clip_score"] == pytest.approx(100 * cosine, abs=1e-3)
        assert figures["prompt"] == prompt
    mean = sum(figures["clip_score"] for figures in card.files.values()) / 3
    assert card.metrics()["clip_score"]["mean"] == pytest.approx(mean)


def test_the_order_of_prompts_matters(tmp_path: Path, clip_folder: str) -> None:
    """Lines go by sorted file names; an object by its names, in any order."""
    one = folder(tmp_path / "one", names="c.webp a.png b.jpg")
    names = ["a.png", "b.jpg", "c.webp"]
    straight = card_of(one, clip=clip_folder, prompts=lines(tmp_path / "p.txt", PROMPTS))
    turned = card_of(one, clip=clip_folder, prompts=lines(tmp_path / "q.txt", PROMPTS[::-1]))
    by_name = tmp_path / "p.json"
    by_name.write_text(json.dumps(dict(reversed(list(zip(names, PROMPTS, strict=True))))))
    assert list(straight.files) == names
    assert card_of(one, clip=clip_folder, prompts=str(by_name)).files == straight.files
    assert abs(turned.files["a.png"]["clip_score"] - straight.files["a.png"]["clip_score"]) > 0.1


def test_direction_of_pictures_and_prompts(tmp_path: Path, clip_folder: str) -> None:
    """FOLDER is what the pictures of --against became, --prompts what their prompts became."""
    after, before = folder(tmp_path / "after", seed=1), folder(tmp_path / "before", seed=2)
    new, old = lines(tmp_path / "new.txt", PROMPTS), lines(tmp_path / "old.txt", PROMPTS[::-1])
    card = card_of(after, against=before, clip=clip_folder, prompts=new, against_prompts=old)
    clip = Clip(clip_folder, "cpu")
    image = [normalize(clip.of_pictures([Image.open(f"{f}/a.png")])[0], dim=0) for f in (after, before)]
    text = [normalize(clip.of_prompts([prompt])[0], dim=0) for prompt in (PROMPTS[0], PROMPTS[-1])]
    want = float(torch.cosine_similarity(image[0] - image[1], text[0] - text[1], dim=0))
    assert card.files["a.png"]["clip_direction"] == pytest.approx(want, abs=1e-5)
    assert card.files["b.jpg"]["clip_direction"] == 0.0  # its prompt has not changed
    other_way = card_of(before, against=after, clip=clip_folder, prompts=new, against_prompts=old)
    assert other_way.files["a.png"]["clip_direction"] == pytest.approx(-want, abs=1e-5)


def test_an_order_that_is_not_that_of_numbers_is_told(tmp_path: Path, clip_folder: str) -> None:
    one = folder(tmp_path / "one", names="out-0.png out-2.png out-10.png")
    job = prepare(one, Scoring(clip=clip_folder, prompts=lines(tmp_path / "p.txt", PROMPTS)))
    assert "'out-10.png' is before 'out-2.png'" in job.warnings[0]
    by_name = tmp_path / "p.json"
    by_name.write_text(json.dumps(job.prompts))
    assert prepare(one, Scoring(clip=clip_folder, prompts=str(by_name))).warnings == ()
    padded = folder(tmp_path / "padded", names="out-00.png out-02.png out-10.png")
    assert prepare(padded, Scoring(clip=clip_folder, prompts=lines(tmp_path / "p.txt", PROMPTS))).warnings == ()


def test_a_long_prompt_is_cut_and_told(tmp_path: Path, clip_folder: str) -> None:
    one = folder(tmp_path / "one", names="a.png")
    card = card_of(one, clip=clip_folder, prompts=lines(tmp_path / "p.txt", ["a very long prompt about a cat"]))
    assert card.warnings == ["--prompts: 1 of 1 prompts were cut: the model takes 16 tokens"]


def test_scores_of_equal_features() -> None:
    assert clip_scores(torch.tensor([[2.0, 0], [0, 1]]), torch.tensor([[5.0, 0], [0, -2]])) == pytest.approx(
        [100, -100]
    )


def test_sets_that_are_no_pairs(tmp_path: Path, clip_folder: str) -> None:
    one, other = folder(tmp_path / "one", names="a.png b.png"), folder(tmp_path / "other", names="x.png y.png z.png")
    card = card_of(one, against=other, unpaired=True, clip=clip_folder)
    assert list(card.metrics()) == ["fid_on_clip_features"]
    assert "2 pictures for 16 features" in card.warnings[0]


def test_one_picture_has_no_distance(tmp_path: Path, clip_folder: str) -> None:
    one, other = folder(tmp_path / "one", names="a.png"), folder(tmp_path / "other", names="a.png")
    with pytest.raises(ConfigError, match="has 1 picture; FID needs at least 2"):
        prepare(one, Scoring(against=other, clip=clip_folder))
    card = card_of(one, against=other, clip=clip_folder, prompts=lines(tmp_path / "p.txt", ["a cat"]))
    assert "1 picture" in card.left_out["FID on CLIP features"]
    assert not card.sets


# LPIPS and FID by Inception


def test_lpips_says_why_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert lacks_lpips(64) == "torchvision is not installed: pip install 'parafuse[eval]'"


def test_a_torchmetrics_that_does_not_load_is_said(monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str]) -> None:
    """As with a torchvision of another torch, which torchmetrics imports."""
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ConfigError, match=r"torchmetrics does not load .* it must be the one of this torch") as error:
        run(prepare(pair[0], Scoring(against=pair[1])))
    assert "\n" not in str(error.value)


def test_lpips_with_weights_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: Any = pytest.importorskip("torchvision.models", reason="LPIPS needs torchvision, which is not installed")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other", seed=1)
    url = models.AlexNet_Weights.DEFAULT.url
    weights = tmp_path / "hub/checkpoints" / url.rsplit("/", 1)[1]
    assert f"nothing is downloaded: put {url} at {weights}" in card_of(one, against=other).left_out["LPIPS"]
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"LPIPS: AlexNet's weights in .* cannot be loaded"):
        card_of(one, against=other)
    torch.save(models.alexnet(weights=None).state_dict(), weights)
    card = card_of(one, against=other)
    assert "LPIPS" not in card.left_out
    assert card.metrics()["lpips"]["mean"] > 0
    assert card_of(one, against=one).metrics()["lpips"]["worst"] == 0
    assert lacks_lpips(30) == "a picture has a side of 30 pixels, and AlexNet needs 31"


def test_inception_wants_its_library_and_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("needs torch-fidelity; pip install 'parafuse[eval]'")):
        scores.check_inception(str(path))
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: object())
    path.write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="is no file of weights that can be read"):
        scores.check_inception(str(path))
    torch.save({"fc.weight": torch.zeros(10, 4)}, path)
    with pytest.raises(ConfigError, match=re.escape("fc.weight is (10, 4); must be (1008, 2048)")):
        scores.check_inception(str(path))


def test_fid_by_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="FID needs torch-fidelity, which is not installed"
    )
    weights = str(tmp_path / "weights.pth")
    torch.manual_seed(0)
    with monkeypatch.context() as patch:  # the class reads a file when it is made: here it reads nothing
        patch.setattr(module, "load_state_dict_from_url", lambda *given, **more: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, values: None)
        random = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    for name, value in random.items():
        if value.ndim == 4:  # so large that pictures do not fade from layer to layer
            random[name] = torch.randn_like(value) * 1.3 * (2 / value[0].numel()) ** 0.5
    torch.save(random, weights)
    one, other = folder(tmp_path / "one", names="a.png b.png"), folder(tmp_path / "other", seed=1, names="c.png d.png")
    card = card_of(one, against=other, unpaired=True, inception=weights)
    assert card.sets["fid"] > 1
    assert "2 pictures for 2048 features" in card.warnings[0]


# Wrong input, and what is written


def broken_clip(path: Path, **config: Any) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    return folder(tmp_path / "one"), folder(tmp_path / "other", seed=1)


WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({}, "has nothing to judge by; give --against FOLDER, or --clip with --prompts."),
    ({"clip": "x"}, "has nothing to judge by"),
    ({"inception": "x"}, "--inception: needs --against; give that too, or leave it out."),
    ({"prompts": "x"}, "--prompts: needs --clip"),
    ({"against": "x", "clip": "x", "against_prompts": "x"}, "--against-prompts: needs --prompts and --against"),
    ({"clip": "x", "prompts": "x", "against_prompts": "x"}, "--against-prompts: needs --prompts and --against"),
    ({"unpaired": True}, "--unpaired: needs --against"),
    ({"unpaired": True, "against": "x"}, "--unpaired: leaves only distances between sets"),
    (
        {"unpaired": True, "against": "x", "clip": "x", "prompts": "x", "against_prompts": "x"},
        "--against-prompts: is for pairs of pictures",
    ),
    ({"against": "x", "device": "gpu"}, "--device 'gpu': must be one of auto, cpu, cuda."),
    ({"against": "x", "out": "x.txt"}, "--out 'x.txt': must end in .json"),
    ({"against": "x", "quiet": True}, "--quiet: nothing would be told"),
    ({"against": "x", "quiet": True, "verbose": True}, "--quiet and --verbose exclude each other"),
    ({"against": "nowhere"}, "--against 'nowhere': does not exist; give a folder of PNG, JPEG or WebP pictures."),
    ({"against": "x", "inception": "nowhere"}, "--inception 'nowhere': is no file; nothing is downloaded"),
    ({"against": "x", "clip": "nowhere"}, "--clip 'nowhere': is no folder; nothing is downloaded"),
]


@pytest.mark.parametrize(("options", "seen"), WRONG_OPTIONS, ids=[seen[:30] for _, seen in WRONG_OPTIONS])
def test_wrong_options_are_said(options: dict[str, Any], seen: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(seen)):
        prepare(folder(tmp_path / "one"), Scoring(**options))


def test_wrong_folders_are_said(tmp_path: Path, pair: tuple[str, str]) -> None:
    one, other = pair
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("no picture")
    cases = [
        (str(tmp_path / "empty"), other, "has no picture; give a folder with PNG, JPEG or WebP files in it."),
        (str(tmp_path / "empty/notes.txt"), other, "is a file; give a folder"),
        (one, folder(tmp_path / "more", names="a.png b.jpg c.webp d.png"), "more': d.png is without a picture"),
        (one, folder(tmp_path / "fewer", names="a.png"), "one': b.jpg, c.webp are without a picture of that name"),
        (one, folder(tmp_path / "small", side=32), "a.png': is 48 x 40 pixels, but "),
        (
            *(folder(tmp_path / name, side=5, names="a.png") for name in ("tiny", "tiny2")),
            "must have at least 6 a side",
        ),
    ]
    for found, want, seen in cases:
        with pytest.raises(ConfigError, match=re.escape(seen)):
            prepare(found, Scoring(against=want))


def test_unreadable_pictures_are_said(tmp_path: Path, pair: tuple[str, str]) -> None:
    one, other = pair
    path = tmp_path / "one/a.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=re.escape("a.png': is no readable picture (")):
        card_of(one, against=other)
    path.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=re.escape("a.png': is no readable picture (")):
        prepare(one, Scoring(against=other))
    Image.new("I;16", (48, 40)).save(path)
    with pytest.raises(ConfigError, match=re.escape("a.png': is of mode I;16; must have 8 bits a channel")):
        prepare(one, Scoring(against=other))
    frames = [Image.new("RGB", (48, 40), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(ConfigError, match=re.escape("a.png': has 2 frames; must be a still picture")):
        prepare(one, Scoring(against=other))


WRONG_PROMPTS = [
    (
        "a cat\na dog\n",
        "has 2 prompts for 3 pictures; must have one line for each, in the order of the sorted file names",
    ),
    ("1\n2\n3\n4\n", "has 4 prompts for 3 pictures"),
    ('{"a.png": "x", "b.jpg": "y"}', "c.webp is without a prompt; give one for each picture."),
    (
        '{"a.png": "x", "b.jpg": "y", "c.webq": "z"}',
        "'c.webq', which is no picture of the folder; did you mean 'c.webp'?",
    ),
    ('{"a.png": "x", "a.png": "y"}', "has 'a.png' twice"),
    ('{"a.png": 3}', "'a.png' has 3; must be a prompt, as text."),
    ('{"a.png": ', "is no readable JSON"),
]


@pytest.mark.parametrize(("text", "seen"), WRONG_PROMPTS, ids=[seen[:20] for _, seen in WRONG_PROMPTS])
def test_wrong_prompts_are_said(text: str, seen: str, tmp_path: Path, clip_folder: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(seen)):
        prepare(folder(tmp_path / "one"), Scoring(clip=clip_folder, prompts=str(path)))


def test_wrong_files_of_prompts_are_said(tmp_path: Path, clip_folder: str) -> None:
    one, path = folder(tmp_path / "one"), tmp_path / "list.json"
    path.write_text('["a", "b", "c"]')
    for name, seen in ((str(path), "must be a JSON object"), ("nowhere.txt", "cannot be read (No such file")):
        with pytest.raises(ConfigError, match=re.escape(seen)):
            prepare(one, Scoring(clip=clip_folder, prompts=name))
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="is no UTF-8 text"):
        prepare(one, Scoring(clip=clip_folder, prompts=str(path)))


def test_wrong_clip_folders_are_said(tmp_path: Path, clip_folder: str, pair: tuple[str, str]) -> None:
    one, other = pair
    for config, seen in (
        ({"model_type": "t5"}, "model_type='t5' in its config.json; must be 'clip'"),
        (None, "no config"),
    ):
        where = broken_clip(tmp_path / "t5", **config) if config else one
        with pytest.raises(ConfigError, match=re.escape(seen)):
            prepare(one, Scoring(against=other, clip=where))
    with pytest.raises(ModelError, match="a CLIP model and its processor cannot be loaded from it"):
        card_of(one, against=other, clip=broken_clip(tmp_path / "bare", model_type="clip"))


def test_a_clip_model_without_all_weights_is_refused(tmp_path: Path, clip_folder: str) -> None:
    """transformers would make random ones, with a warning that the command line does not show."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(clip_folder, tmp_path / "clip")
    path = tmp_path / "clip/model.safetensors"
    weights = load_file(path)
    del weights["visual_projection.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=re.escape("its weights lack 1 tensors, visual_projection.weight among them")):
        Clip(str(tmp_path / "clip"), "cpu")


def test_the_command_writes_and_tells(
    tmp_path: Path, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("silence_libraries", "hide_loading_bars"):  # they act on the whole process
        monkeypatch.setattr(cli.quiet, name, lambda: None)
    one, other = pair
    out = tmp_path / "deep/scores.json"
    command = cli.Launch(["score", one, "--against", other, "--out", str(out)], supervised=False)
    assert cli.run(command) == 0
    told = capfd.readouterr()
    assert re.search(r"^PSNR, dB +\d+\.\d\d +\d+\.\d\d +\w\.\w+", told.out, re.M)
    assert "parafuse: LPIPS is left out: " in told.err
    written = json.loads(out.read_text())
    assert written["schema"] == 1
    assert written["versions"].keys() >= {"parafuse", "torch", "torchmetrics", "pillow"}
    assert list(written["files"]) == ["a.png", "b.jpg", "c.webp"]
    values = [figures["psnr_db"] for figures in written["files"].values()]
    assert written["metrics"]["psnr_db"]["worst"] == min(values)
    assert written["asked"]["against"] == other
    before = out.read_bytes()
    assert cli.run(command) == 2
    assert f"--out {str(out)!r}: exists, and is not overwritten" in capfd.readouterr().err
    assert out.read_bytes() == before
    (tmp_path / "one/b.jpg").write_bytes(b"")
    assert cli.run(cli.Launch(["score", one, "--against", other, "--out", str(tmp_path / "x.json")], False)) == 2
    assert not (tmp_path / "x.json").exists()
    assert capfd.readouterr().out == ""
