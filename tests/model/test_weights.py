"""Reading foreign and hostile files, strict loading, the round trip of what we write."""

import json
import os
import pickle
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import SIZE, images, randomised, tiny

import riformer
from riformer.model import weights
from riformer.model.start import start_from
from riformer.model.variants import VARIANTS
from riformer.model.weights import (
    convert,
    identify,
    load,
    load_strict,
    read_checkpoint,
    save,
    save_pretrained,
    to_timm_keys,
)


def assert_same_state(actual: dict, expected: dict) -> None:
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def s12():
    """A state dict of riformer_s12's shapes that takes no space in files."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in timm.create_model("riformer_s12").state_dict().items()}
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


# identify


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "args",
    [
        {},
        {"mixer": "pooling"},
        {"num_classes": 10},
        {"in_chans": 1},
        {"num_classes": 0},
        {"mixer": "pooling", "layer_scale_init": 0},
    ],
    ids=str,
)
def test_identify(name, args):
    with torch.device("meta"):
        state = timm.create_model(name, **args).state_dict()
    assert identify(state, "poolformer" if args.get("mixer") else "") == (name, args)


def test_identify_mmpretrain_deploy_form():
    with torch.device("meta"):
        state = timm.create_model("riformer_m36", mixer="identity").state_dict()
    renamed = {f"backbone.{key}".replace(".norm1.", ".norm_reparam."): value for key, value in state.items()}
    assert identify(renamed) == ("riformer_m36", {"mixer": "identity"})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"fc.weight": torch.zeros(2, 2)}, r"unknown key layout: fc\.weight, "),
        ({"features.0.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}, r"layout: fc\.bias, features\.0\.weight"),
        ({"stages.0.blocks.0.norm2.weight": torch.zeros(())}, r"no variant has depths \(1,\) and dims \(1,\)"),
    ],
)
def test_identify_refuses(state, message):
    with pytest.raises(ValueError, match=message):
        identify(state)


def test_identify_refuses_unknown_mixers(s12):
    state = {key.replace("token_mixer.weight", "token_mixer.qkv.weight"): value for key, value in s12.items()}
    with pytest.raises(ValueError, match="belong to no mixer"):
        identify(state)


def test_two_names_for_one_tensor_are_refused(s12):
    state = {**s12, "backbone.stem.conv.weight": s12["stem.conv.weight"]}
    with pytest.raises(ValueError, match=r"both mean 'stem\.conv\.weight'"):
        to_timm_keys(state)


def test_our_own_keys_stay(s12):
    assert to_timm_keys(s12).keys() == s12.keys()


# layouts of the file


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("zipped", [True, False])
def test_read_pytorch_files(wrap, zipped, tmp_path):
    state = tiny().state_dict()
    torch.save(wrap(state), tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    assert_same_state(read_checkpoint(tmp_path / "file.pth"), state)


def test_read_safetensors(tmp_path):
    state = tiny().state_dict()
    save_file(state, tmp_path / "file.safetensors")
    assert_same_state(read_checkpoint(tmp_path / "file.safetensors"), state)


@pytest.mark.parametrize(
    "content", [{}, [1, 2], "text", {"state_dict": {}}, {"a": 1}, {1: torch.zeros(1)}, torch.ones(2)]
)
def test_files_without_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_checkpoint(tmp_path / "file.pth")


@pytest.mark.parametrize("name", ["missing.pth", "missing.safetensors", "folder.pth"])
def test_missing_file(name, tmp_path):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ValueError, match=f"no checkpoint file at .*{name}"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("suffix", ["pth", "legacy.pth", "safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.0005, 0.02, 0.5, 0.999])
def test_truncated_files(suffix, kept, tmp_path):
    path = tmp_path / f"file.{suffix}"
    if suffix == "safetensors":
        save_file(tiny().state_dict(), path)
    else:
        torch.save(tiny().state_dict(), path, _use_new_zipfile_serialization=suffix == "pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="not a checkpoint that can be read safely"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content", [b"hello", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100), bytes(1000), b"\x80\x02\x93"]
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_other_files(content, suffix, tmp_path):
    path = tmp_path / f"file.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        read_checkpoint(path)


# hostile and foreign objects


class Evil:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def write(path: Path, content: object, fmt: str) -> None:
    if fmt == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=fmt == "zip")


@pytest.mark.parametrize("fmt", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("function", [os.system, eval, exec])
def test_nothing_in_a_checkpoint_runs(fmt, function, tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "file.pth"
    code = f"touch '{mark}'" if function is os.system else f"__import__('pathlib').Path({str(mark)!r}).touch()"
    evil, state = Evil(function, code), {"a": torch.ones(2)}

    pickle.loads(pickle.dumps(evil))
    assert mark.exists(), "control: the attack works on an open door"
    mark.unlink()

    write(path, {"state_dict": state, "meta": evil}, fmt)
    if fmt == "zip" and function is not os.system:  # inert placeholders; os is refused outright
        assert_same_state(read_checkpoint(path), state)
    else:
        with pytest.raises(ValueError, match="not a checkpoint that can be read safely"):
            read_checkpoint(path)
    for content in (evil, {"state_dict": evil}, {"state_dict": {**state, "b": evil}}):
        write(path, content, fmt)
        with pytest.raises(ValueError, match=r"not a checkpoint that can be read safely|holds no state dict"):
            load(path)
    assert not mark.exists()


def test_foreign_objects_are_tolerated(tmp_path, monkeypatch):
    module = ModuleType("elsewhere")
    exec(
        "class HistoryBuffer:\n"
        "    def __init__(self, values):\n"
        "        self.values, self.count, self.options = values, values.sum(), {'window': {1, 2}}\n"
        "def mean(buffer):\n"
        "    raise AssertionError\n",
        module.__dict__,
    )
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    state = {"a": torch.ones(2), "b": torch.arange(3)}
    foreign = {"loss": module.HistoryBuffer(np.arange(5.0)), "mean": module.mean, "path": Path("x"), "n": np.float64(1)}
    torch.save(
        {"state_dict": state, "message_hub": foreign, "more": [module.HistoryBuffer(np.ones(2))]}, tmp_path / "f.pth"
    )
    monkeypatch.delitem(sys.modules, "elsewhere")
    assert_same_state(read_checkpoint(tmp_path / "f.pth"), state)
    assert "elsewhere" not in sys.modules


# strict loading


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.fc.bias"), r"missing: head\.fc\.bias \(5,\)"),
        (lambda s: s.update(extra=torch.ones(2, 3)), r"unexpected: extra \(2, 3\)"),
        (lambda s: s.update({"head.fc.bias": torch.ones(7)}), r"shape of head\.fc\.bias: \(7,\), in the model \(5,\)"),
    ],
)
def test_load_strict_loads_all_or_nothing(change, message):
    model, state = tiny(), randomised(tiny()).state_dict()
    before = deepcopy(model.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        load_strict(model, state)
    assert_same_state(model.state_dict(), before)


def test_wrong_form_is_refused(s12, tmp_path):
    block = "stages.2.blocks.3.token_mixer."
    torch.save({key: value for key, value in s12.items() if not key.startswith(block)}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=rf"missing: {block}weight \(320,\)\n.*missing: {block}bias \(320,\)$"):
        convert(tmp_path / "file.pth", tmp_path / "ours.safetensors")
    assert names(tmp_path) == ["file.pth"]


# save and load

FILES = ["config.json", "model.safetensors"]
FORMS = {
    "training": lambda: randomised(tiny()),
    "fused": lambda: riformer.fuse(randomised(tiny())),
    "folded": lambda: riformer.fold(randomised(tiny())),
    "pooling": lambda: randomised(tiny(mixer="pooling")),
    "per stage": lambda: randomised(tiny(mixer=("pooling", "affine", "token_matrix", "attention"))),
    "per stage, fused": lambda: riformer.fuse(
        randomised(tiny(mixer=("pooling", "affine", "token_matrix", "attention")))
    ),
    "no classifier": lambda: randomised(tiny(num_classes=0)),
    "max pooling": lambda: randomised(tiny(global_pool="max")),
    "four channels": lambda: randomised(tiny(in_chans=4)),
    "stem": lambda: randomised(tiny(stem_patch=3, stem_stride=2, mlp_ratio=2.0, drop_path_rate=0.1)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["model", "model.safetensors"])
def test_round_trip(form, place, tmp_path):
    model = FORMS[form]().eval()
    x = images(2, model.in_chans, 64, 64)
    written = save(model, tmp_path / "new" / place)
    loaded = load(written)
    assert not loaded.training
    assert str(loaded) == str(model) or "drop_path" in str(model)
    assert_same_state(loaded.state_dict(), model.state_dict())
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    if place == "model":
        in_timm = timm.create_model(f"local-dir:{written}", pretrained=True).eval()
        torch.testing.assert_close(in_timm(x), model(x), rtol=0, atol=0)
        assert names(written) == FILES
    again = load(save(loaded, tmp_path / "again" / place))
    assert_same_state(again.state_dict(), model.state_dict())


def test_changed_classifier_travels(tmp_path):
    model = tiny()
    model.reset_classifier(7, "avg")
    assert load(save(model, tmp_path / "model.safetensors")).get_classifier().out_features == 7


def test_channels_last(tmp_path):
    model = randomised(tiny()).to(memory_format=torch.channels_last)
    assert_same_state(load(save(model, tmp_path / "model.safetensors")).state_dict(), model.state_dict())


@pytest.mark.parametrize(("written", "read"), [("float64", "float64"), ("float16", "float32"), ("bfloat16", "float32")])
def test_precision(written, read, tmp_path):
    model = randomised(tiny()).to(getattr(torch, written))
    loaded = load(save(model, tmp_path / "model.safetensors"))
    assert_same_state(loaded.state_dict(), model.to(getattr(torch, read)).state_dict())


@pytest.mark.parametrize("place", ["model", "model.safetensors"])
def test_preprocessing_and_class_names_travel(place, tmp_path):
    overlay = dict(
        input_size=(3, 48, 48), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.8, interpolation="bilinear",
        label_names=["ant", "bee", "cow", "dog", "elk"],
    )  # fmt: skip
    model = riformer.fuse(tiny(pretrained_cfg_overlay=overlay))
    once = load(save(model, tmp_path / "once" / place))
    twice = load(save(once, tmp_path / "twice" / place))
    for loaded in (once, twice):
        cfg = {key: loaded.pretrained_cfg[key] for key in overlay}
        assert json.loads(json.dumps(cfg)) == json.loads(json.dumps(overlay))


@pytest.mark.parametrize("place", ["model", "model.safetensors"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_any_timm_model(name, place, tmp_path):
    model = timm.create_model(name, num_classes=3).eval()
    loaded = load(save(model, tmp_path / place))
    assert type(loaded) is type(model)
    assert_same_state(loaded.state_dict(), model.state_dict())


def test_run_folder_means_its_best(tmp_path):
    model = randomised(tiny())
    save(model, tmp_path / "best")
    assert_same_state(load(tmp_path).state_dict(), model.state_dict())


def test_converted_deploy_form_stays_deploy_form(tmp_path):
    save(riformer.fuse(randomised(tiny())), tmp_path / "a.safetensors")
    written = convert(tmp_path / "a.safetensors", tmp_path / "folder")
    assert written == tmp_path / "folder"
    assert isinstance(load(written).stages[0].blocks[0].token_mixer, riformer.model.mixers.Identity)


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"has no best/ and no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"architecture": "nonsense", "pretrained_cfg": {}}'])
def test_damaged_config(config, tmp_path):
    save(tiny(), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"describes no model|'nonsense' is unknown"):
        load(tmp_path / "model")


def test_config_of_another_model(tmp_path):
    for dims in ((8, 16, 24, 32), (8, 16, 24, 40)):
        save(tiny(dims=dims), tmp_path / str(dims[-1]))
    (tmp_path / "40" / "config.json").replace(tmp_path / "32" / "config.json")
    with pytest.raises(ValueError, match=r"shape of head\.norm\.weight: \(32,\), in the model \(40,\)"):
        load(tmp_path / "32")


@pytest.mark.parametrize("place", ["model", "model.safetensors"])
@pytest.mark.parametrize("write", [lambda p: save(tiny(mixer="pooling"), p), lambda p: convert(p.parent / "a.pth", p)])
def test_a_failed_save_leaves_what_was_there(place, write, tmp_path, monkeypatch, s12):
    torch.save(s12, tmp_path / "a.pth")
    model = randomised(tiny())
    save(model, tmp_path / place)

    def half_written(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / place)
    assert names(tmp_path) == ["a.pth", place]
    assert_same_state(load(tmp_path / place).state_dict(), model.state_dict())


def test_save_replaces_a_model_and_nothing_else(tmp_path):
    save(tiny(), tmp_path / "model")
    model = randomised(tiny(), seed=5)
    save(model, tmp_path / "model")
    assert_same_state(load(tmp_path / "model").state_dict(), model.state_dict())
    assert names(tmp_path) == ["model"]
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="save would replace it"):
            save(model, place)
    assert names(tmp_path) == ["model", "notes.txt"]


def test_a_card_belongs_to_the_model_that_it_was_written_with(tmp_path):
    for card, files in (("# card", ["README.md", *FILES]), ("", FILES)):
        save_pretrained(tiny(), tmp_path / "model", card)
        assert names(tmp_path / "model") == files


@pytest.mark.parametrize("other", ["notes.txt", "README.md", ".git"])
def test_a_folder_of_other_things_is_never_replaced(other, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / other).write_text("mine")
    for write in (save, save_pretrained):
        with pytest.raises(ValueError, match="is no model folder"):
            write(tiny(), tmp_path / "folder")
    assert (tmp_path / "folder" / other).read_text() == "mine"


def test_save_pretrained_writes_folders_only(tmp_path):
    with pytest.raises(ValueError, match=r"model\.safetensors: weights are written"):
        save_pretrained(tiny(), tmp_path / "model.safetensors")
    assert names(tmp_path) == []


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "README.md"])
def test_a_failure_at_any_file_leaves_the_model_that_was_there(file, tmp_path, monkeypatch):
    model = randomised(tiny())
    save_pretrained(model, tmp_path / "model", "# first")

    def fails_at(write):
        def attempt(*args, **kwargs):
            write(*args, **kwargs)
            if any(isinstance(arg, Path) and arg.name == file for arg in args):
                raise OSError("disk full")

        return attempt

    monkeypatch.setattr(weights, "save_file", fails_at(save_file))
    monkeypatch.setattr(Path, "write_text", fails_at(Path.write_text))
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(tiny(), tmp_path / "model", "# second")
    monkeypatch.undo()
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "README.md").read_text() == "# first"
    assert_same_state(load(tmp_path / "model").state_dict(), model.state_dict())


class Wrapper(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile, lambda model: riformer.MetaFormer((1,), (8,))])
def test_save_takes_models_of_timm_only(wrap, tmp_path):
    with pytest.raises(ValueError, match=r"save takes a model built by timm\.create_model"):
        save(wrap(tiny()), tmp_path / "model")
    assert names(tmp_path) == []


def test_a_runtime_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"save takes a model built by timm\.create_model, not Runtime"):
        save(riformer.optimize(tiny(), images(), backend="portable"), tmp_path / "model")


# the start from a teacher


def test_start_from_takes_all_but_the_mixers():
    student, teacher = tiny(), randomised(tiny(mixer="pooling"))
    fresh = {key: value.clone() for key, value in student.state_dict().items() if ".token_mixer." in key}
    start_from(student, teacher.state_dict())
    assert len(fresh) == 2 * sum(SIZE["depths"])
    assert student.state_dict().keys() - teacher.state_dict().keys() == fresh.keys()
    assert_same_state(student.state_dict(), {**teacher.state_dict(), **fresh})


def test_start_from_ignores_the_teachers_mixers():
    student, teacher = tiny(), randomised(tiny(mixer="attention"))
    start_from(student, teacher.state_dict())
    torch.testing.assert_close(student.stages[3].blocks[0].token_mixer.weight, torch.ones(32))
    torch.testing.assert_close(student.head.fc.weight, teacher.head.fc.weight, rtol=0, atol=0)


def test_start_from_timms_poolformer():
    student, teacher = timm.create_model("riformer_s12"), timm.create_model("poolformer_s12")
    start_from(student, teacher.state_dict())
    torch.testing.assert_close(student.head.norm.weight, teacher.head.norm.weight, rtol=0, atol=0)
    torch.testing.assert_close(student.stem.conv.weight, teacher.stem.conv.weight, rtol=0, atol=0)


def test_start_from_names_both_key_lists():
    student = tiny()
    before = deepcopy(student.state_dict())
    state = randomised(tiny(mixer="pooling")).state_dict()
    state["head.other"] = state.pop("head.norm.weight")
    with pytest.raises(
        ValueError, match=r"missing: head\.norm\.weight \(32,\)\n.*unexpected: head\.other \(32,\)"
    ) as error:
        start_from(student, state)
    assert "token_mixer" not in str(error.value)
    assert_same_state(student.state_dict(), before)
