"""Sharing: what timm reads from a folder and from the Hub is what was saved, bit for bit, with all that is noted."""

import json
import time
from pathlib import Path

import pytest
import timm
import torch
from fake_hub import FakeHub
from huggingface_hub import HfApi, constants
from tiny import images, randomised, tiny

import riformer
from riformer.distill.teachers import open_model
from riformer.model.fuse import FORMS
from riformer.model.hub import from_pretrained, push
from riformer.model.weights import load, save, save_pretrained

NOTED = dict(
    input_size=(3, 48, 40), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.8, interpolation="bilinear",
    label_names=("ant", "bee", "cow", "dog", "elk"),
)  # fmt: skip
GREY = {**NOTED, "input_size": (1, 48, 40), "mean": (0.5,), "std": (0.3,), "label_names": tuple("abcdefg")}
SIZES = {
    "five classes": dict(pretrained_cfg_overlay=NOTED),
    "one channel, seven classes": dict(in_chans=1, num_classes=7, pretrained_cfg_overlay=GREY),
    "no classifier": dict(num_classes=0, pretrained_cfg_overlay={**NOTED, "label_names": None}),
}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeHub:
    return FakeHub(tmp_path / "hub", monkeypatch)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Parameters, logits, and everything noted are equal."""
    x = images(2, expected.in_chans, 48, 40)
    torch.testing.assert_close(dict(actual.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(actual.eval()(x), expected.eval()(x), rtol=0, atol=0)
    for key in ("mixers", "in_chans", "num_classes"):
        assert getattr(actual, key) == getattr(expected, key)
    noted = [json.dumps({key: model.pretrained_cfg.get(key) for key in NOTED}) for model in (actual, expected)]
    assert noted[0] == noted[1]  # as JSON, which has no tuples


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_timm_reads_the_folder(form, size, tmp_path):
    model = FORMS[form](randomised(tiny(**SIZES[size])))
    written = save_pretrained(model, tmp_path / "model", "# card")
    assert names(written) == ["README.md", "config.json", "model.safetensors"]
    assert (written / "README.md").read_text() == "# card"
    for loaded in (timm.create_model(f"local-dir:{written}", pretrained=True), from_pretrained(written)):
        assert_same(loaded, model)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_pushed_is_the_folder_and_comes_back(form, hub, tmp_path):
    model = FORMS[form](randomised(tiny(pretrained_cfg_overlay=NOTED)))
    folder = save_pretrained(model, tmp_path / "model", "---\nlicense: mit\n---\n# ours\n")
    push(folder, "me/tiny-net", private=True)
    there = hub.root / "me/tiny-net"
    assert names(there) == names(folder)
    for name in names(folder):
        assert (there / name).read_bytes() == (folder / name).read_bytes(), name
    assert hub.private == {"me/tiny-net": True}
    for reference in ("me/tiny-net", "hf-hub:me/tiny-net"):
        loaded = from_pretrained(reference)
        assert not loaded.training
        assert_same(loaded, load(folder))
    assert_same(timm.create_model("hf-hub:me/tiny-net", pretrained=True), load(folder))


def test_a_second_push_replaces_model_and_card(hub, tmp_path):
    for seed in (1, 2):
        push(save_pretrained(randomised(tiny(), seed), tmp_path / "model", f"# card {seed}"), "me/net")
    assert (hub.root / "me/net/README.md").read_text() == "# card 2"
    assert_same(from_pretrained("me/net"), load(tmp_path / "model"))


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_a_failed_push_leaves_the_folder_and_says_what_it_takes(step, hub, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ConnectionError("401 Unauthorized")

    folder = save_pretrained(tiny(), tmp_path / "model", "# card")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(HfApi, step, refuse)
    with pytest.raises(RuntimeError, match=r"(?s)was not pushed to me/net: 401 Unauthorized.*hf auth login"):
        push(folder, "me/net")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["", "net", "me/net/x", "hf-hub:me/net", "me/", "me/my net", "/net"])
def test_push_refuses_other_names(name, hub, tmp_path):
    with pytest.raises(ValueError, match="must be OWNER/NAME"):
        push(save(tiny(), tmp_path / "model"), name)
    assert hub.private == {}


def test_push_refuses_a_folder_without_a_model(hub, tmp_path):
    with pytest.raises(ValueError, match="neither a run folder nor a model folder"):
        push(tmp_path, "me/net")
    assert hub.private == {}


def test_a_folder_comes_before_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there, here = (randomised(tiny(), seed) for seed in (1, 2))
    push(save(there, tmp_path / "pushed"), "me/net")
    save(here, tmp_path / "me/net")
    assert_same(from_pretrained("me/net"), load("me/net"))
    assert_same(from_pretrained("hf-hub:me/net"), load("pushed"))
    save(here, tmp_path / "run/best")
    assert_same(from_pretrained(Path("run")), load("me/net"))
    assert_same(from_pretrained(save(here, "model.safetensors")), load("me/net"))


def test_a_revision_can_be_asked_for(hub, tmp_path):
    push(save(tiny(), tmp_path / "model"), "me/net")
    for reference in ("me/net", "me/net@v1.0", "hf-hub:me/net@refs/pr/1"):
        from_pretrained(reference)
    assert hub.revisions == [None, "v1.0", "refs/pr/1"]


def test_from_pretrained_says_what_is_missing(hub, tmp_path):
    for reference in ("net", tmp_path / "absent", "hf-hub:net", "me/net@"):
        with pytest.raises(ValueError, match="where no folder is; it must be one, or hf-hub:OWNER/NAME"):
            from_pretrained(reference)
    with pytest.raises(ValueError, match="'me/absent', where no folder is, and the Hub gave no such model: 404"):
        from_pretrained("me/absent")
    (hub.root / "me/empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no config\.json"):
        from_pretrained("me/empty")


def test_public_names():
    assert riformer.from_pretrained is from_pretrained
    assert riformer.save_pretrained is save_pretrained


@pytest.mark.parametrize(
    "read", [from_pretrained, open_model, lambda reference: open_model("timm:resnet10t")], ids=["model", "hub", "timm"]
)
def test_a_hub_out_of_reach_is_given_up_at_once(read, monkeypatch):
    """Nothing listens on that port. Left alone, the client tries six times, for 23 seconds or more."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"me/net|timm:resnet10t"):
        read("hf-hub:me/net")
    assert time.monotonic() - began < 10
    assert not constants.HF_HUB_OFFLINE
