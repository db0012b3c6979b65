"""config.json from anywhere: nothing is fetched, nothing hangs, every wrong value is one message with its name."""

import http.server
import json
import resource
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny import images

import riformer
from riformer.distill.teachers import open_model
from riformer.model.fuse import FORMS
from riformer.model.weights import convert, load, save, save_pretrained

CLASSES = 3


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder without checksums, so that its config.json can be anything."""
    written = save(timm.create_model("riformer_micro", num_classes=CLASSES), tmp_path / "m")
    save_file(load_file(written / "model.safetensors"), written / "model.safetensors")
    return written


def change(folder: Path, **changes) -> None:
    """Changes fields; those of model_args and pretrained_cfg by dicts of fields."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if key in ("model_args", "pretrained_cfg") and isinstance(value, dict):
            config.setdefault(key, {}).update(value)
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def refusal(folder: Path) -> str:
    """The message with which the folder, and a file with the same text, are refused."""
    messages = []
    text = (folder / "config.json").read_text()
    file = folder.with_suffix(".safetensors")
    save_file(load_file(folder / "model.safetensors"), file, metadata={"riformer": text})
    for read, place in ((load, folder), (load, file), (open_model, f"local-dir:{folder}")):
        with pytest.raises(ValueError, match=str(folder.parent)) as error:
            read(place)
        messages.append(str(error.value))
    assert all(len(message) < 40_000 for message in messages)
    return messages[0]


# fetching


@pytest.fixture
def server(tmp_path):
    """A web server with weights that would fit; its `hits` are the paths that were asked for."""
    root = tmp_path / "web"
    root.mkdir()
    torch.save(timm.create_model("riformer_micro", num_classes=CLASSES).state_dict(), root / "w.pth")
    hits: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(root), **kwargs)

        def do_GET(self):
            hits.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.hits = hits
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def sources(server, root: Path) -> dict[str, dict]:
    return {
        "url": {"url": f"http://127.0.0.1:{server.server_port}/w.pth"},
        "file": {"file": str(root / "web/w.pth")},
        "hf_hub_id": {"hf_hub_id": "me/net", "hf_hub_filename": "w.pth", "source": "hf-hub"},
        "custom_load": {"custom_load": True, "file": str(root / "web/w.pth")},
        "local-dir": {"source": "local-dir", "file": str(root / "web")},
    }


@pytest.mark.parametrize("source", ["url", "file", "hf_hub_id", "custom_load", "local-dir"])
def test_no_load_fetches_or_opens_what_a_config_names(source, server, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    expected = load(folder).state_dict()
    change(folder, pretrained_cfg=sources(server, tmp_path)[source])
    model = load(folder)  # where weights once came from is no error
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=0, atol=0)
    assert not {"url", "file", "hf_hub_id", "hf_hub_filename"} & {k for k, v in model.pretrained_cfg.items() if v}
    change(folder, model_args={"pretrained": True})
    assert "model_args has pretrained" in refusal(folder)
    assert server.hits == []


def test_the_server_answers(server, monkeypatch, tmp_path):
    """The control: a model that is asked to fetch does."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    overlay = sources(server, tmp_path)["url"]
    timm.create_model("riformer_micro", pretrained=True, num_classes=CLASSES, pretrained_cfg_overlay=overlay)
    assert server.hits == ["/w.pth"]


@pytest.mark.parametrize(
    "argument",
    ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "pretrained_strict"],
)
def test_arguments_of_the_factory_are_refused(argument, folder):
    change(folder, model_args={argument: {"url": "http://127.0.0.1:9/x"}})
    assert f"model_args has {argument}" in refusal(folder)


# sizes


@pytest.mark.parametrize(
    "args",
    [
        {"depths": [10**6, 1]},
        {"depths": [10**9, 10**9]},
        {"depths": [30_000, 1]},
        {"dims": [10**6, 10**6]},
        {"dims": [10**9, 8]},
        {"dims": [10**18, 10**18]},
        {"depths": [10**6, 1], "mixer": ["affine"] * 10**5},
        {"mixer": "token_matrix", "img_size": 8192},
        {"mlp_ratio": 1e12},
        {"num_classes": 10**7},
        {"stem_patch": 10**6},
    ],
    ids=lambda args: str(args)[:40],
)
def test_absurd_sizes_cost_neither_time_nor_memory(args, folder):
    change(folder, model_args=args)
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(("name", "args"), [("test_vit", {"depth": 10**7}), ("resnet10t", {"layers": [10**7] * 4})])
def test_absurd_sizes_of_other_networks(name, args, tmp_path):
    written = save(timm.create_model(name, num_classes=CLASSES), tmp_path / "m")
    save_file(load_file(written / "model.safetensors"), written / "model.safetensors")
    change(written, model_args=args)
    assert "but the weights have" in refusal(written)


def test_a_text_without_end(folder):
    (folder / "config.json").write_text('{"architecture": "' + "x" * 2**24 + '"}')
    assert "describes no model: 16777217 characters" in refusal(folder)


# fields


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": 5}, "architecture is 5"),
        ({"architecture": ["a"]}, "architecture is"),
        ({"architecture": "../../x"}, "'../../x' is unknown"),
        ({"architecture": "local-dir:/etc"}, "is unknown"),
        ({"num_classes": "ten"}, "config.json.num_classes is 'ten'"),
        ({"num_classes": -1}, "num_classes is '-1'"),
        ({"num_classes": True}, "num_classes is 'True'"),
        ({"num_classes": 7}, "num_classes is 7, but model_args.num_classes is 3"),
        ({"label_names": ["a", "b"]}, "label_names has 2 names for 3 classes"),
        ({"label_names": 5}, "label_names is '5'"),
        ({"label_names": "abc"}, "label_names is 'abc'"),
        ({"label_names": [1, 2, 3]}, "label_names is"),
        ({"label_names": {"0": "a", "2": "c"}}, "label_names is"),
        ({"pretrained_cfg": {"mean": "x"}}, "pretrained_cfg.mean is 'x'"),
        ({"pretrained_cfg": {"mean": [0.1, 0.2]}}, "pretrained_cfg.mean"),
        ({"pretrained_cfg": {"std": [0, 0, 0]}}, "pretrained_cfg.std"),
        ({"pretrained_cfg": {"std": [1, 1, float("nan")]}}, "pretrained_cfg.std"),
        ({"pretrained_cfg": {"interpolation": "magic"}}, "pretrained_cfg.interpolation is 'magic'"),
        ({"pretrained_cfg": {"interpolation": ["bicubic"]}}, "pretrained_cfg.interpolation"),
        ({"pretrained_cfg": {"crop_mode": "corner"}}, "pretrained_cfg.crop_mode"),
        ({"pretrained_cfg": {"crop_pct": 1e-9}}, "pretrained_cfg.crop_pct is '1e-09'"),
        ({"pretrained_cfg": {"crop_pct": 0}}, "pretrained_cfg.crop_pct"),
        ({"pretrained_cfg": {"crop_pct": "1"}}, "pretrained_cfg.crop_pct"),
        ({"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}}, "pretrained_cfg.input_size"),
        ({"pretrained_cfg": {"input_size": [3, 16]}}, "pretrained_cfg.input_size"),
        ({"pretrained_cfg": {"input_size": 16}}, "pretrained_cfg.input_size"),
        ({"pretrained_cfg": {"classifier": 7}}, "pretrained_cfg.classifier"),
        ({"pretrained_cfg": {"evil": 1}}, "pretrained_cfg has evil"),
        ({"pretrained_cfg": [1]}, "describes no model"),
        ({"model_args": [1]}, "describes no model"),
        ({"model_args": {"stem_stride": 0}}, "stem_stride is [0]; it must be"),
        ({"model_args": {"stem_stride": -2}}, "cannot be built with"),
        ({"model_args": {"stem_stride": 2.5}}, "cannot be built with"),
        ({"model_args": {"dims": [0, 0]}}, "cannot be built with|does not fit"),
        ({"model_args": {"dims": [-1, 8]}}, "cannot be built with"),
        ({"model_args": {"dims": "88"}}, "cannot be built with"),
        ({"model_args": {"depths": ["a", "b"]}}, "cannot be built with"),
        ({"model_args": {"depths": []}}, "cannot be built with"),
        ({"model_args": {"mixer": 7}}, "cannot be built with"),
        ({"model_args": {"mixer": [None, None]}}, "cannot be built with"),
        ({"model_args": {"mixer": "os.system"}}, "os.system' is unknown"),
        ({"model_args": {"layer_scale_init": "x"}}, "cannot be built with"),
        ({"model_args": {"layer_scale_init": float("inf")}}, "model_args.layer_scale_init is inf"),
        ({"model_args": {"evil": 1}}, "cannot be built with"),
        ({"riformer": 5}, "describes no model"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_a_wrong_value_is_one_message_that_names_it(changes, message, folder):
    load(folder)
    change(folder, **changes)
    assert any(part in refusal(folder) for part in message.split("|"))


@pytest.mark.parametrize("text", ["", "[]", "null", "5", "{}", "[" * 10**5, "\x00", '{"architecture": 1e999}', "é" * 9])
def test_a_text_that_describes_no_model(text, folder):
    (folder / "config.json").write_text(text, encoding="latin-1" if "é" in text else "utf-8")
    with pytest.raises(ValueError, match=str(folder)):
        load(folder)


@pytest.mark.parametrize("names", [list("abc"), {"0": "a", "2": "c", "1": "b"}])
def test_class_names_as_timm_writes_them(names, folder):
    change(folder, label_names=names)
    assert list(load(folder).pretrained_cfg["label_names"]) == list("abc")


def test_names_of_a_classifier_that_was_replaced_are_not_saved(tmp_path, caplog):
    model = timm.create_model("riformer_micro", num_classes=3, pretrained_cfg_overlay={"label_names": tuple("abc")})
    model.reset_classifier(5)
    assert not load(save(model, tmp_path / "m")).pretrained_cfg.get("label_names")
    assert "left out 3 class names of a model with 5 classes" in caplog.text


# what timm does not know

TRAIN_DATA = {"name": "folder:photos", "splits": {"train": "ab" * 32, "val": None}, "images": [3, 4], "seed": 0}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["m", "m.safetensors"])
def test_the_record_of_the_training_data_travels(form, place, tmp_path):
    model = timm.create_model("riformer_micro", num_classes=3)
    model.pretrained_cfg["train_data"] = TRAIN_DATA
    path = save(FORMS[form](model), tmp_path / place)
    for loaded in (load(path), riformer.from_pretrained(path), load(convert(path, tmp_path / "again"))):
        assert loaded.pretrained_cfg["train_data"] == TRAIN_DATA
        assert FORMS[form](loaded).pretrained_cfg["train_data"] == TRAIN_DATA
    in_timm = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True)
    torch.testing.assert_close(in_timm.eval()(images(1, 3, 16, 16)), load(path)(images(1, 3, 16, 16)), rtol=0, atol=0)
    assert "train_data" not in in_timm.pretrained_cfg


def test_a_record_that_is_no_json_is_refused(tmp_path):
    model = timm.create_model("riformer_micro")
    model.pretrained_cfg["train_data"] = {"path": Path("x")}
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        save_pretrained(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_record_cannot_bring_back_a_source(folder):
    change(folder, riformer={"url": "http://127.0.0.1:9/x", "train_data": TRAIN_DATA})
    model = load(folder)
    assert not model.pretrained_cfg.get("url")
    assert model.pretrained_cfg["train_data"] == TRAIN_DATA
