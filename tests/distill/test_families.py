"""What every family of teachers must do: pair, give maps of right shapes, teach every affine, stay frozen."""

import pytest
import timm
import torch
from families import NETWORKS, build, build_small
from tiny import images, randomised
from torch import nn
from torch.testing import assert_close

from riformer.distill.families import FAMILIES, block_names, family_of
from riformer.distill.imitation import TERMS, Imitation
from riformer.distill.objective import Objective
from riformer.distill.taps import tap
from riformer.distill.teachers import Teacher, build_teacher

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture
def student() -> nn.Module:
    return build("riformer_mini", depths=(1, 2, 1), dims=(8, 16, 32), img_size=32)


@pytest.fixture(params=NETWORKS)
def teacher(request) -> Teacher:
    return Teacher(build_small(request.param), MEAN, STD)


def test_every_known_class_is_covered():
    with torch.device("meta"):
        assert {type(build_small(network)).__name__ for network in NETWORKS} == set(FAMILIES)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_pairs_follow_depth_and_are_described(student, teacher, positions):
    imitation = Imitation(student, teacher, TERMS, 32, positions)
    ours = [name for stage in block_names(student) for name in stage]
    theirs = [name for stage in block_names(teacher.model) for name in stage]
    assert [pair[0] for pair in imitation.pairs] == (ours if positions == "all" else [ours[0], ours[2], ours[3]])
    depths = [theirs.index(pair[1]) for pair in imitation.pairs]
    assert depths == sorted(depths)
    assert depths[-1] == len(theirs) - 1
    lines = imitation.describe()
    assert len(lines) == len(imitation.pairs)
    assert all(f"{a} imitates {b}" in line for (a, b), line in zip(imitation.pairs, lines, strict=True))


def test_maps_have_the_shapes_that_the_network_has(student, teacher):
    imitation = Imitation(student, teacher, TERMS, 32, "all")
    widths = {info["module"]: info["num_chs"] for info in getattr(teacher.model, "feature_info", [])}
    for name, pairs in imitation.modules.items():
        for (_, module), (own, their) in zip(pairs, imitation.shapes[name], strict=True):
            assert own[0] in (8, 16, 32)
            assert own[1] == own[2]
            assert their[1] == their[2] in (8, 4, 2, 1)
            stage = next((stage_module for stage_module in widths if module.startswith(stage_module)), None)
            assert stage is None or their[0] == widths[stage]


def test_outputs_become_the_maps_of_forward_intermediates(student, teacher):
    """The last block of each stage, read by hooks in the family's layout, is what timm itself calls the feature map."""
    stages = block_names(teacher.model)
    pixels = torch.randn(2, 3, 32, 32)
    imitation = Imitation(student, teacher, ["block"], 32, "all")
    imitated = {block for _, block in imitation.pairs}
    with torch.no_grad():
        expected = teacher.model.forward_intermediates(pixels, intermediates_only=True)
    with imitation.tapped(), torch.no_grad():
        student(pixels)
        teacher.model(pixels)
        last = [stage[-1] for stage in stages] if len(stages) > 1 else stages[0]
        compared = 0
        for name, feature in zip(last, expected, strict=True):
            if name in imitated:
                assert_close(imitation._maps("stages.0.blocks.0", name)[1], feature)
                compared += 1
    assert compared


@pytest.mark.parametrize("term", TERMS)
def test_each_term_reaches_every_affine_and_its_projections_and_never_the_teacher(student, teacher, term):
    randomised(student)
    imitation = Imitation(student, teacher, [term], 32, "all")
    with Objective(student, {term: 1.0}, imitation=imitation) as objective:
        terms = objective(images(4, 3, 32, 32), torch.eye(6)[:4])
    assert set(terms) == {"loss", "output", term}
    terms["loss"].backward()
    parameters = dict(imitation.projections.named_parameters())
    parameters |= {name: p for name, p in student.named_parameters() if "token_mixer" in name}
    assert len(parameters) >= 8
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_projections_are_there_only_where_widths_differ(student, teacher):
    imitation = Imitation(student, teacher, TERMS, 32, "all")
    expected = {
        f"{name}{i}"
        for name in ("block", "mixer")
        for i, (ours, theirs) in enumerate(imitation.shapes[name])
        if ours[0] != theirs[0]
    }
    assert set(imitation.projections) == expected
    assert list(imitation.projections) == sorted(expected)  # one order in every process: block before mixer
    again = Imitation(student, teacher, TERMS, 32, "all")
    assert_close(again.projections.state_dict(), imitation.projections.state_dict(), rtol=0, atol=0)
    assert not any("projection" in name for name in student.state_dict())


def test_a_family_names_modules_that_a_block_has(teacher):
    family = family_of(teacher.model)
    for block in (teacher.model.get_submodule(name) for stage in block_names(teacher.model) for name in stage):
        for name in (family.mixer, family.mlp, family.imitated_mixer, *family.norms):
            assert isinstance(block.get_submodule(name), nn.Module)


def test_it_stays_frozen_in_eval_mode_under_its_own_normalisation(teacher):
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    config = teacher.model.pretrained_cfg
    pixels = torch.rand(2, 3, 32, 32)

    def normalised(mean, std):
        return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    expected = teacher.model(normalised(config["mean"], config["std"]))
    assert_close(teacher(normalised(MEAN, STD)), expected, atol=1e-4, rtol=1e-4)
    assert expected.shape == (2, 6)


def test_looking_at_shapes_leaves_the_student_and_the_generators_as_they_were(student, teacher):
    student.train()
    before = torch.get_rng_state()
    Imitation(student, teacher, TERMS, 32)
    assert student.training
    assert torch.equal(torch.get_rng_state(), before) is True
    with tap(student, ["stem"]) as taps:
        assert taps == {}


def test_a_perfect_imitation_costs_nothing(teacher):
    """A network compared with itself: the layouts of both sides are undone alike, whatever they are."""
    imitation = Imitation(teacher.model, teacher, TERMS, 32, "all")
    with imitation.tapped():
        teacher.model(teacher.see(images(2, 3, 32, 32)))
        assert {name: float(term) for name, term in imitation.terms().items()} == dict.fromkeys(TERMS, 0.0)


@pytest.mark.filterwarnings("ignore:.*searchsorted", "ignore:Using a non-tuple sequence")  # in timm's resampling
@pytest.mark.parametrize("name", ["vit", "deit", "swin", "gfnet_h", "convnext"])
def test_a_teacher_is_read_from_a_checkpoint_of_its_architecture_at_another_size(name, tmp_path):
    """`timm:NAME@FILE`, position embeddings and filters resampled to the size asked for."""
    architecture, _ = NETWORKS[name]
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in timm.create_model(architecture, num_classes=6).state_dict().items()}
    torch.manual_seed(0)
    torch.save({"model": {key: torch.randn(shape) * 0.02 for key, shape in shapes.items()}}, tmp_path / "tuned.pth")
    sizes = {}
    for img_size in (0, 64):
        read = build_teacher(f"timm:{architecture}@{tmp_path / 'tuned.pth'}", "abcdef", MEAN, STD, img_size)
        assert read.model.num_classes == 6
        assert "state_dict" not in read.model.pretrained_cfg
        sizes[img_size] = read.size
        if name != "swin" or not img_size:
            assert read(torch.randn(1, 3, 32, 32)).shape == (1, 6)
    assert sizes[64] == (64, 64)
    assert sizes[0][0] >= 224
