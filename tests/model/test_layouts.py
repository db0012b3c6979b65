"""Checkpoints in the layouts of their authors, written down here by hand: every tensor lands where the layout says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

import riformer
from riformer import cli
from riformer.model import weights

SIZES = {
    "s12": ((2, 2, 6, 2), (64, 128, 320, 512)),
    "s24": ((4, 4, 12, 4), (64, 128, 320, 512)),
    "s36": ((6, 6, 18, 6), (64, 128, 320, 512)),
    "m36": ((6, 6, 18, 6), (96, 192, 384, 768)),
    "m48": ((8, 8, 24, 8), (96, 192, 384, 768)),
}
NUM_PARAMS = {  # in training form and in deploy form
    "s12": (11_921_832, 11_915_176),
    "s24": (21_402_280, 21_388_968),
    "s36": (30_882_728, 30_862_760),
    "m36": (56_199_016, 56_172_520),
    "m48": (73_508_776, 73_473_448),
}
GFNETS = {
    "gfnet_h_ti": ((3, 3, 10, 3), (64, 128, 256, 512), 15_085_096),
    "gfnet_h_s": ((3, 3, 10, 3), (96, 192, 384, 768), 32_162_632),
    "gfnet_h_b": ((3, 3, 27, 3), (96, 192, 384, 768), 53_744_200),
}
Entry = tuple[str, str, tuple[int, ...]]
"""A key of the checkpoint, the parameter that it is for, its shape in the checkpoint."""


def pair(theirs: str, ours: str, shape: tuple[int, ...]) -> Iterator[Entry]:
    """Weight and bias."""
    yield f"{theirs}.weight", f"{ours}.weight", shape
    yield f"{theirs}.bias", f"{ours}.bias", shape[:1]


def metaformer(size: str, layout: str) -> Iterator[Entry]:
    """A RIFormer of mmpretrain in "training" or "deploy" form, or a PoolFormer of its "authors"."""
    depths, dims = SIZES[size]
    prefix = "" if layout == "authors" else "backbone."
    yield from pair(f"{prefix}patch_embed.proj", "stem.conv", (dims[0], 3, 7, 7))
    for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        if stage:
            shape = (dim, dims[stage - 1], 3, 3)
            yield from pair(f"{prefix}network.{2 * stage - 1}.proj", f"stages.{stage}.downsample.conv", shape)
        for block in range(depth):
            theirs, ours = f"{prefix}network.{2 * stage}.{block}", f"stages.{stage}.blocks.{block}"
            yield from pair(f"{theirs}.{'norm_reparam' if layout == 'deploy' else 'norm1'}", f"{ours}.norm1", (dim,))
            if layout == "training":
                yield f"{theirs}.token_mixer.affine.weight", f"{ours}.token_mixer.weight", (dim, 1, 1, 1)
                yield f"{theirs}.token_mixer.affine.bias", f"{ours}.token_mixer.bias", (dim,)
            yield from pair(f"{theirs}.norm2", f"{ours}.norm2", (dim,))
            yield from pair(f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1", (4 * dim, dim, 1, 1))
            yield from pair(f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2", (dim, 4 * dim, 1, 1))
            yield f"{theirs}.layer_scale_1", f"{ours}.layer_scale1.scale", (dim,)
            yield f"{theirs}.layer_scale_2", f"{ours}.layer_scale2.scale", (dim,)
    yield from pair("norm" if layout == "authors" else "backbone.norm6", "head.norm", (dims[3],))
    yield from pair("head" if layout == "authors" else "head.fc", "head.fc", (1000, dims[3]))


def gfnet(name: str) -> Iterator[Entry]:
    """A GFNet-H of its authors, whose names this package keeps."""
    depths, dims, _ = GFNETS[name]
    entries: list[tuple[str, tuple[int, ...]]] = [("pos_embed", (1, 3136, dims[0]))]
    for stage, (depth, dim, height) in enumerate(zip(depths, dims, (56, 28, 14, 7), strict=True)):
        shape = (dim, dims[stage - 1], 2, 2) if stage else (dim, 3, 4, 4)
        entries += [(f"patch_embed.{stage}.proj.weight", shape), (f"patch_embed.{stage}.proj.bias", (dim,))]
        for block in range(depth):
            of_block = {
                "gamma": (dim,),
                "norm1.weight": (dim,),
                "norm1.bias": (dim,),
                "filter.complex_weight": (height, height // 2 + 1, dim, 2),
                "norm2.weight": (dim,),
                "norm2.bias": (dim,),
                "mlp.fc1.weight": (4 * dim, dim),
                "mlp.fc1.bias": (4 * dim,),
                "mlp.fc2.weight": (dim, 4 * dim),
                "mlp.fc2.bias": (dim,),
            }
            entries += [(f"blocks.{stage}.{block}.{key}", shape) for key, shape in of_block.items()]
    entries += [("norm.weight", (dims[3],)), ("norm.bias", (dims[3],))]
    entries += [("head.weight", (1000, dims[3])), ("head.bias", (1000,))]
    return ((key, key, shape) for key, shape in entries)


def value(index: int, shape: tuple[int, ...]) -> Tensor:
    """A ramp along the first dimension that is longer than one, another for each index.

    Stored as this ramp alone, so that the largest checkpoints take kilobytes.
    """
    along = next(i for i, n in enumerate(shape) if n > 1)
    ramp = index + torch.arange(shape[along]) / (2 * shape[along])
    return ramp.view([-1 if i == along else 1 for i in range(len(shape))]).expand(shape)


def write(entries: list[Entry], path: Path, under: str = "") -> None:
    state = {key: value(i, shape) for i, (key, _, shape) in enumerate(entries)}
    torch.save({under: state, "meta": {"epoch": 600}} if under else state, path)
    assert path.stat().st_size < 3e6


def assert_landed(model: torch.nn.Module, entries: list[Entry]) -> None:
    """Every parameter of the model holds the tensor of the key that the layout has for it."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == {name for _, name, _ in entries} == model.state_dict().keys()
    for i, (key, name, shape) in enumerate(entries):
        assert torch.equal(parameters[name], value(i, shape).reshape(parameters[name].shape)), key


@pytest.mark.parametrize("img_size", [224, 384])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["training", pytest.param("deploy", marks=pytest.mark.slow)])
def test_the_ten_riformers_of_mmpretrain(size, form, img_size, tmp_path):
    entries = list(metaformer(size, form))
    write(entries, tmp_path / "file.pth", "state_dict")
    name = f"riformer_{size}.mmpretrain_in1k" + ("_384" if img_size == 384 else "")
    model = weights._load(tmp_path / "file.pth", name)
    assert_landed(model, entries)
    assert sum(p.numel() for p in model.parameters()) == NUM_PARAMS[size][form == "deploy"]
    assert model.mixers == ["affine" if form == "training" else "identity"] * len(model.mixers)
    config = model.pretrained_cfg
    assert config["input_size"] == (3, img_size, img_size)
    assert config["crop_pct"] == (0.949 if size.startswith("m") else 0.9)


@pytest.mark.parametrize("size", SIZES)
def test_the_five_poolformers_of_their_authors(size, tmp_path):
    entries = list(metaformer(size, "authors"))
    write(entries, tmp_path / "file.pth.tar")
    model = riformer.load(tmp_path / "file.pth.tar")
    assert_landed(model, entries)
    assert model.pretrained_cfg["architecture"] == f"riformer_{size}"
    assert set(model.mixers) == {"pooling"}


@pytest.mark.parametrize("name", GFNETS)
def test_the_three_gfnets_of_their_authors(name, tmp_path):
    entries = list(gfnet(name))
    write(entries, tmp_path / "file.pth", "model")
    model = riformer.load(tmp_path / "file.pth")
    assert_landed(model, entries)
    assert model.pretrained_cfg["architecture"] == name
    assert sum(p.numel() for p in model.parameters()) == GFNETS[name][2]


@pytest.mark.parametrize("form", ["training", "deploy"])
def test_convert_writes_what_was_read(form, tmp_path):
    entries = list(metaformer("s12", form))
    write(entries, tmp_path / "file.pth", "state_dict")
    source, destination = str(tmp_path / "file.pth"), tmp_path / "ours.safetensors"
    assert cli.run("convert", [source, str(destination), "--model", "riformer_s12.mmpretrain_in1k_384"]) == 0
    model = riformer.load(destination)
    assert_landed(model, entries)
    assert model.pretrained_cfg["input_size"] == (3, 384, 384)
    destination.unlink()


@pytest.mark.parametrize("size", SIZES)
def test_timms_poolformer_is_a_start_for_the_riformer_of_its_size(size):
    with torch.device("meta"):
        student, teacher = timm.create_model(f"riformer_{size}"), timm.create_model(f"poolformer_{size}")
    riformer.start_from(student, teacher.state_dict())
