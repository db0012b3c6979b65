"""Checkpoint files of others: which weights are taken, wrapper prefixes, class names, damage, permissions."""

import logging
import os
import random
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny import images, randomised, tiny
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import riformer
from riformer import cli
from riformer.distill.teachers import open_model
from riformer.model.checkpoint import WEIGHTS_SUM, read_checkpoint, read_file
from riformer.model.keys import to_timm_keys
from riformer.model.variants import identify
from riformer.model.weights import convert, load, save


def micro(seed: int = 0, **args) -> riformer.MetaFormer:
    return randomised(timm.create_model("riformer_micro", num_classes=4, **args), seed).eval()


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=0)


# several networks with the same keys

AMBIGUOUS = {
    "deploy": lambda: riformer.fuse(micro()),
    "poolformer": lambda: micro(mixer="pooling"),
    "timm-poolformer": lambda: micro(mixer="pooling", pool_first=True),
    "deleted": lambda: micro(mixer="nothing"),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("form", AMBIGUOUS)
def test_keys_of_several_networks_need_the_form(form, suffix, tmp_path):
    model, path = AMBIGUOUS[form]().eval(), tmp_path / f"w.{suffix}"
    (torch.save if suffix == "pth" else save_file)(model.state_dict(), path)
    for read in (load, riformer.from_pretrained, open_model):
        with pytest.raises(ValueError, match=r"several networks: say which it is with form, one of .*--form"):
            read(str(path))
    loaded = load(path, form=form)
    torch.testing.assert_close(loaded(images(2, 3, 16, 16)), model(images(2, 3, 16, 16)), rtol=0, atol=0)
    assert cli.run("convert", [str(path), str(tmp_path / "said.safetensors"), "--form", form]) == 0
    again = load(tmp_path / "said.safetensors")
    torch.testing.assert_close(again(images(2, 3, 16, 16)), model(images(2, 3, 16, 16)), rtol=0, atol=0)


def test_the_forms_are_different_functions():
    logits = [build().eval()(images(2, 3, 16, 16)) for build in AMBIGUOUS.values()]
    for i, one in enumerate(logits):
        assert all((one - other).abs().max() > 1e-2 for other in logits[i + 1 :])


def in_keys_of_the_authors(mixer: str) -> dict[str, Tensor]:
    """An S12 without mixer weights under the keys of the PoolFormer's authors, or of mmpretrain's deploy form."""
    with torch.device("meta"):
        state = timm.create_model("riformer_s12", mixer=mixer).state_dict()
    renamed = {}
    for key, value in state.items():
        stage, _, block = key.removeprefix("stages.").partition(".blocks.")
        new = f"network.{2 * int(stage)}.{block}" if block else key
        renamed[new.replace(".norm1.", ".norm_reparam.") if mixer == "identity" else new] = value
    return renamed


@pytest.mark.parametrize(
    ("state", "form", "message"),
    [
        (lambda: micro().state_dict(), "deploy", "form is 'deploy', but the keys are those of training"),
        (lambda: riformer.fuse(micro()).state_dict(), "training", "'training', but the keys are those of deploy or"),
        (lambda: micro().state_dict(), "deplyo", r"form is 'deplyo'; did you mean one of \['deploy'"),
        (lambda: in_keys_of_the_authors("pooling"), "deploy", "'deploy', but the keys are those of poolformer"),
        (lambda: in_keys_of_the_authors("identity"), "poolformer", "'poolformer', but the keys are those of deploy"),
    ],
)
def test_a_form_that_cannot_be_is_refused(state, form, message):
    with pytest.raises(ValueError, match=message):
        identify(state(), form)


def test_a_model_that_says_its_form_needs_none(tmp_path):
    for place in ("model", "model.safetensors"):
        with pytest.raises(ValueError, match="says itself which form"):
            load(save(micro(), tmp_path / place), form="deploy")


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("mixer", ["pooling", "identity"])
def test_the_layout_of_the_authors_says_its_form(mixer, prefix):
    state = {prefix + key: value for key, value in in_keys_of_the_authors(mixer).items()}
    assert identify(state) == ("riformer_s12", {"mixer": mixer})


def test_timms_poolformer_keeps_its_function(tmp_path):
    theirs = randomised(timm.create_model("poolformer_s12", num_classes=7)).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="timm-poolformer"):
        load(tmp_path / "w.pth")
    x = images(1, 3, 64, 64)
    model = load(convert(tmp_path / "w.pth", tmp_path / "folder", form="timm-poolformer"))
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(riformer.fuse(model)(x), theirs(x), rtol=1e-5, atol=1e-5)
        official = load(tmp_path / "w.pth", form="poolformer")
        assert (official(x) - theirs(x)).abs().max() > 1e-2 * theirs(x).abs().max()  # control: another function


def test_the_other_order_of_the_head_does_not_collapse():
    model = timm.create_model("riformer_micro", pool_first=True)
    with pytest.raises(ValueError, match=r"the head pools by 'avg' before GroupNorm"):
        riformer.optimize(model, images(1, 3, 16, 16), backend="portable")


# several weights in one file


@pytest.mark.parametrize("ema", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("plain", ["state_dict", "model"])
def test_ema_weights_come_first_and_a_log_line_says_so(ema, plain, tmp_path, caplog):
    states = {plain: micro(1).state_dict(), ema: micro(2).state_dict()}
    torch.save({**states, "epoch": 3}, tmp_path / "w.pth")
    assert_same_state(load(tmp_path / "w.pth").state_dict(), states[ema])
    assert f"read the weights named {ema}, not {plain}" in caplog.text
    assert_same_state(load(tmp_path / "w.pth", use_ema=False).state_dict(), states[plain])
    assert f"read the weights named {plain}, not {ema}" in caplog.text
    assert_same_state(open_model(f"timm:riformer_micro@{tmp_path / 'w.pth'}").state_dict(), states[ema])
    for flags, state in (([], states[ema]), (["--plain"], states[plain])):
        assert cli.run("convert", [str(tmp_path / "w.pth"), str(tmp_path / "o.safetensors"), *flags]) == 0
        assert_same_state(load(tmp_path / "o.safetensors").state_dict(), state)


def test_one_set_of_weights_needs_no_log_line(tmp_path, caplog):
    for name in ("state_dict", "model", "state_dict_ema"):
        torch.save({name: micro().state_dict(), "optimizer": {"state": {}}, "args": {"lr": 0.1}}, tmp_path / "w.pth")
        load(tmp_path / "w.pth")
    torch.save({"state_dict": {"model": micro().state_dict()}}, tmp_path / "w.pth")
    load(tmp_path / "w.pth")
    assert not caplog.records


def test_plain_weights_that_are_not_there(tmp_path):
    torch.save({"state_dict_ema": micro().state_dict()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="it has only state_dict_ema, and use_ema is False"):
        load(tmp_path / "w.pth", use_ema=False)


# wrappers

PREFIXES = [
    "module.",
    "_orig_mod.",
    "model.",
    "backbone.",
    "ema_model.module.",
    "module._orig_mod.",
    "network.",
    "a.b.c.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_all_keys_share_is_removed(prefix, tmp_path):
    state = micro().state_dict()
    torch.save({"state_dict": {prefix + key: value for key, value in state.items()}}, tmp_path / "w.pth")
    assert_same_state(load(tmp_path / "w.pth").state_dict(), state)
    for name in ("riformer_micro", "resnet10t"):
        state = randomised(timm.create_model(name, num_classes=3)).state_dict()
        torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "w.pth")
        teacher = open_model(f"timm:{name}@{tmp_path / 'w.pth'}")
        assert teacher.num_classes == 3
        assert_same_state(teacher.state_dict(), state)


@pytest.mark.parametrize("prefix", ["module.", "student.module."])
def test_prefixes_of_other_layouts(prefix):
    with torch.device("meta"):
        gfnet = timm.create_model("gfnet_h_ti").state_dict()
        deploy = timm.create_model("riformer_m36", mixer="identity").state_dict()
    assert identify({prefix + key: value for key, value in gfnet.items()}) == ("gfnet_h_ti", {})
    renamed = {f"backbone.{key}".replace(".norm1.", ".norm_reparam."): value for key, value in deploy.items()}
    renamed["head.fc.weight"] = renamed.pop("backbone.head.fc.weight")  # so that backbone. is not common to all
    assert identify({prefix + key: value for key, value in renamed.items()}) == ("riformer_m36", {"mixer": "identity"})


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, AveragedModel], ids=["parallel", "compile", "average"]
)
def test_state_dicts_of_real_wrappers(wrap, tmp_path):
    model = micro()
    torch.save(wrap(model).state_dict(), tmp_path / "w.pth")
    assert next(iter(torch.load(tmp_path / "w.pth"))) not in model.state_dict()
    assert_same_state(load(tmp_path / "w.pth").state_dict(), model.state_dict())


def test_a_prefix_of_some_keys_stays():
    state = micro().state_dict()
    mixed = {("module." if i % 2 else "") + key: value for i, (key, value) in enumerate(state.items())}
    assert to_timm_keys(mixed).keys() == mixed.keys()
    with pytest.raises(ValueError, match=r"unknown key layout: model\.a\.weight, other\.bias"):
        identify({"model.a.weight": torch.ones(2), "other.bias": torch.ones(2)})


# class names

NAMES = ["ant", "bee [wild]", "cow", "dog"]


@pytest.mark.parametrize(
    "more",
    [
        {"meta": {"dataset_meta": {"classes": NAMES}}},
        {"meta": {"dataset_meta": {"CLASSES": tuple(NAMES)}, "epoch": 3}},
        {"meta": {"CLASSES": tuple(NAMES)}},
        {"classes": NAMES},
        {"class_to_idx": {name: i for i, name in reversed(list(enumerate(NAMES)))}},
    ],
    ids=str,
)
def test_class_names_of_foreign_files(more, tmp_path):
    torch.save({"state_dict": micro().state_dict(), **more}, tmp_path / "w.pth")
    assert list(load(tmp_path / "w.pth").pretrained_cfg["label_names"]) == NAMES
    again = load(convert(tmp_path / "w.pth", tmp_path / "o.safetensors"))
    assert list(again.pretrained_cfg["label_names"]) == NAMES
    teacher = open_model(f"timm:riformer_micro@{tmp_path / 'w.pth'}")
    assert list(teacher.pretrained_cfg["label_names"]) == NAMES


@pytest.mark.parametrize("names", [5, "text", [1, 2, 3, 4], {"a": 7}, {"a": "b"}, [], None])
def test_other_values_are_no_class_names(names, tmp_path):
    torch.save({"state_dict": micro().state_dict(), "classes": names, "meta": names}, tmp_path / "w.pth")
    assert not load(tmp_path / "w.pth").pretrained_cfg.get("label_names")


def test_names_of_other_classes_are_left_out_and_said(tmp_path, caplog):
    torch.save({"state_dict": micro().state_dict(), "classes": NAMES[:3]}, tmp_path / "w.pth")
    assert not load(tmp_path / "w.pth").pretrained_cfg.get("label_names")
    assert "left out its 3 names of 4 classes" in caplog.text


# damage


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("zipped", [True, False])
def test_refused_pickles_do_not_quote_unsafe_advice(zipped, tmp_path):
    torch.save({"state_dict": Evil()}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"not a checkpoint that can be read safely: it would run posix\.system"
    ) as error:
        load(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(b"\x80\x04\x95.")
    with pytest.raises(ValueError, match="not a checkpoint that can be read safely") as other:
        load(tmp_path / "w.pth")
    for message in (str(error.value), str(other.value)):
        assert "weights_only" not in message
        assert "trusted" not in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["w.pth", "w.safetensors", "folder"])
def test_weights_that_are_not_finite_are_refused(bad, place, tmp_path):
    model = micro()
    with torch.no_grad():
        model.head.fc.bias[1] = bad
    path = tmp_path / place
    torch.save(model.state_dict(), path) if place.endswith("pth") else save(model, path)
    with pytest.raises(ValueError, match=rf"{path}.* has 1 tensors with values that are not finite .* head\.fc\.bias"):
        load(path)
    if path.is_file():
        with pytest.raises(ValueError, match="not finite"):
            open_model(f"timm:riformer_micro@{path}")


def flips(path: Path, num: int, seed: int) -> list[tuple[int, int]]:
    """Places (byte, bit) spread over the file, its first and last byte among them."""
    draw, size = random.Random(seed), path.stat().st_size
    places = [0, 8, size - 1, *(draw.randrange(size) for _ in range(num - 3))]
    return [(place, draw.randrange(8)) for place in places]


@pytest.mark.parametrize("file", ["m.safetensors", "folder/model.safetensors", "folder/config.json"])
def test_one_flipped_bit_is_found(file, tmp_path):
    model = micro(pretrained_cfg_overlay={"label_names": tuple(NAMES)})
    place = tmp_path / file.partition("/")[0]
    path, whole = tmp_path / file, save(model, place)
    before = path.read_bytes()
    metadata = max(before.find(b'"__metadata__"'), 0)
    header = [(metadata + i, i % 8) for i in range(0, 300, 7)]  # the keys and values of the metadata, if there are any
    for byte, bit in [*flips(path, 60, seed=1), *header]:
        if byte >= len(before):
            continue
        damaged = bytearray(before)
        damaged[byte] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(place)):
            load(whole)
        with pytest.raises(ValueError, match=str(place)):
            open_model(f"local-dir:{whole}" if place.is_dir() else str(whole))
    path.write_bytes(before)
    load(whole)


def test_a_damaged_best_of_a_run_is_found(tmp_path):
    save(micro(), tmp_path / "run/best")
    path = tmp_path / "run/best/model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-9] ^= 4
    path.write_bytes(damaged)
    for read in (load, riformer.from_pretrained, lambda run: open_model(str(run))):
        with pytest.raises(ValueError, match=r"best/model\.safetensors is damaged"):
            read(tmp_path / "run")


def test_a_config_edited_on_purpose_is_read_when_asked(tmp_path):
    model = micro()
    config = save(model, tmp_path / "m") / "config.json"
    config.write_text(
        config.read_text().replace('"num_classes": 4,', '"num_classes": 4, "label_names": ["a","b","c","d"],', 1)
    )
    with pytest.raises(ValueError, match=r"config\.json is not what was written .* was edited.*verify=False"):
        load(tmp_path / "m")
    assert list(load(tmp_path / "m", verify=False).pretrained_cfg["label_names"]) == list("abcd")
    assert cli.run("convert", [str(tmp_path / "m"), str(tmp_path / "again"), "--unverified"]) == 0
    assert list(load(tmp_path / "again").pretrained_cfg["label_names"]) == list("abcd")


@pytest.mark.parametrize("place", ["m.safetensors", "m"])
def test_files_from_before_the_checksums_load(place, tmp_path, caplog):
    model = micro()
    path = save(model, tmp_path / place)
    file = path / "model.safetensors" if path.is_dir() else path
    config = read_file(file).config
    save_file(load_file(file), file, metadata={"riformer": config} if config else None)
    assert_same_state(load(path).state_dict(), model.state_dict())
    assert not caplog.records


def test_the_weights_of_a_folder_are_checked_alone(tmp_path):
    save(micro(), tmp_path / "m")
    alone = (tmp_path / "m/model.safetensors").rename(tmp_path / "alone.safetensors")
    assert_same_state(read_checkpoint(alone), micro().state_dict())
    tensors = load_file(alone)
    tensors["head.fc.bias"] += 1
    save_file(tensors, alone, metadata={WEIGHTS_SUM: "0" * 64})
    with pytest.raises(ValueError, match=r"alone\.safetensors is damaged"):
        read_checkpoint(alone)


def test_a_checkpoint_of_another_architecture_is_no_teacher_by_name(tmp_path):
    save(riformer.fuse(tiny()), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"holds a riformer_s12, not a poolformer_s12: give the file without timm:"):
        open_model(f"timm:poolformer_s12@{tmp_path / 'w.safetensors'}")


# files


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_written_files_follow_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        files = [save(micro(), tmp_path / "m.safetensors"), *save(micro(), tmp_path / "m").iterdir()]
    finally:
        os.umask(before)
    assert [file.stat().st_mode & 0o777 for file in files] == [mode] * 3


def test_tied_tensors_are_saved(tmp_path):
    model = micro()
    model.stages[1].blocks[0].norm2 = model.stages[1].blocks[0].norm1
    loaded = load(save(model, tmp_path / "m"))
    torch.testing.assert_close(loaded(images(2, 3, 16, 16)), model(images(2, 3, 16, 16)), rtol=0, atol=0)


def test_an_ill_fitting_or_missing_weights_file_is_one_message(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save(timm.create_model("riformer_micro", num_classes=3), tmp_path / "m")
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "m/pytorch_model.bin")
    (tmp_path / "m/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"does not fit MetaFormer"):
        open_model(f"local-dir:{tmp_path / 'm'}")
    (tmp_path / "m/pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint file at .*model\.safetensors"):
        open_model(f"local-dir:{tmp_path / 'm'}")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": []}},
        lambda state: {"module": state, "step": 7},
        lambda state: {"params": state},
        lambda state: {"net": state, "acc": 0.5},
        lambda state: {"model": {key: 2 * value for key, value in state.items()}, "model_ema": {"module": state}},
        lambda state: {"params": {key: 2 * value for key, value in state.items()}, "params_ema": state},
    ],
    ids=["tutorial", "engine", "params", "net", "nested average", "average"],
)
def test_weights_are_found_under_the_names_of_other_trainers(tmp_path, wrap):
    state = tiny().state_dict()
    torch.save(wrap(state), tmp_path / "x.pth")
    torch.testing.assert_close(read_checkpoint(tmp_path / "x.pth"), dict(state), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda m: {"student": m.state_dict(), "teacher": m.state_dict()}, "it has student, teacher: save the one"),
        (lambda m: m, "it holds a whole module: save its state_dict"),
        (lambda m: [1], "it has no dicts"),
        (lambda m: {"a": torch.eye(3).to_sparse()}, "a is sparse"),
        (lambda m: {"a": torch.eye(3, dtype=torch.complex64)}, "a is complex"),
        (lambda m: {"a": torch.eye(3, device="meta")}, "a is without values"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_what_is_no_state_dict_says_what_it_is(tmp_path, content, message):
    torch.save(content(tiny()), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "x.pth")


def test_whole_numbers_are_no_weights(tmp_path):
    model = timm.create_model("riformer_micro")
    torch.save({key: value.char() for key, value in model.state_dict().items()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"type of stem\.conv\.weight: torch\.int8, in the model torch\.float32"):
        load(tmp_path / "x.pth")
