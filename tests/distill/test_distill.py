"""Taps, teachers and the objective on tiny networks."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import riformer
from riformer.distill.objective import IMITATION, Objective, imitation_scale
from riformer.distill.taps import tap
from riformer.distill.teachers import Teacher, block_names, build_teacher, match_blocks

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
NAMES = ["stages.0.blocks.1", "stages.1.blocks.0.token_mixer"]
TERMS = ("label", "hard", "soft", *IMITATION)


def build(mixer: str = "affine", seed: int = 0, **args) -> nn.Module:
    torch.manual_seed(seed)
    args = {"depths": (2, 1), "dims": (8, 16), "layer_scale_init": 0.5, "num_classes": 6, **args}
    return timm.create_model("riformer_s12", mixer=mixer, stem_patch=2, stem_stride=2, img_size=8, **args)


def batch(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(9)
    return torch.randn(n, 3, 8, 8), torch.eye(6)[torch.randint(6, (n,))]


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_tap_sees_what_the_modules_put_out_and_leaves_no_hook():
    model = build()
    images, _ = batch()
    with tap(model, NAMES) as taps:
        assert taps == {}
        model(images)
    expected = model.stages[0](model.stem(images))
    assert_close(taps["stages.0.blocks.1"], expected)
    assert taps["stages.0.blocks.1"].requires_grad
    taps.clear()
    model(images)
    assert taps == {}
    assert not any(module._forward_hooks for module in model.modules())


def test_unknown_tap_fails_before_the_first_forward_and_names_near_ones():
    with (
        pytest.raises(ValueError, match=r"stages\.0\.blocks\.7.*near are.*stages\.0\.blocks\.[01]"),
        tap(build(), ["stages.0.blocks.7"]),
    ):
        pass


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_tap_works_under_compile_with_gradients(backend):
    torch._dynamo.reset()
    model = build()
    compiled = torch.compile(model, backend=backend)
    images, _ = batch()
    with tap(compiled, NAMES) as taps:
        for size in (4, 2):
            taps.clear()
            compiled(images[:size])
            assert_close(taps[NAMES[0]], model.stages[0](model.stem(images[:size])))
        model.zero_grad()
        taps[NAMES[0]].sum().backward()
    assert model.stem.conv.weight.grad.abs().sum() > 0


def test_objective_refuses_a_student_compiled_before_it_was_tapped():
    torch._dynamo.reset()
    student = build()
    compiled = torch.compile(student, backend="eager")
    images, targets = batch()
    compiled(images)
    objective = Objective(compiled, {"block": 1.0}, module_teacher=Teacher(build("pooling"), MEAN, STD))
    with objective, pytest.raises(RuntimeError, match="tap it before its first compiled call"):
        objective(images, targets)


def test_tap_works_under_ddp(one_process_group):
    model = build()
    images, targets = batch()
    plain = Objective(model, {"soft": 1.0, "block": 1.0, "mixer": 1.0}, *[Teacher(build("pooling", 1), MEAN, STD)] * 2)
    with plain:
        expected = plain(images, targets)
        expected["loss"].backward()
    gradient = model.stem.conv.weight.grad.clone()
    model.zero_grad()
    wrapped = Objective(
        DistributedDataParallel(model),
        {"soft": 1.0, "block": 1.0, "mixer": 1.0},
        *[Teacher(build("pooling", 1), MEAN, STD)] * 2,
    )
    with wrapped:
        actual = wrapped(images, targets)
        actual["loss"].backward()
    assert_close(actual, expected)
    assert_close(model.stem.conv.weight.grad, gradient)


def test_teacher_stays_frozen_in_eval_and_gives_no_gradient():
    teacher = Teacher(build("pooling", drop_path_rate=0.5), MEAN, STD)
    nn.ModuleList([teacher]).train()
    images, _ = batch()
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(images.requires_grad_()).requires_grad


def test_teacher_sees_its_own_normalisation():
    model = build("pooling")
    model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    pixels = torch.rand(2, 3, 8, 8)

    def normalised(mean, std):
        return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    expected = model.eval()(normalised((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    assert_close(Teacher(model, MEAN, STD)(normalised(MEAN, STD)), expected, atol=1e-5, rtol=1e-5)
    assert (Teacher(model, MEAN, STD)(pixels) - expected).abs().max() > 1e-3


def test_build_teacher_reads_saved_models_and_refuses_other_classes(tmp_path):
    model = build("attention").eval()
    riformer.save(model, tmp_path / "teacher")
    config = model.pretrained_cfg
    teacher = build_teacher(str(tmp_path / "teacher"), 6, config["mean"], config["std"])
    images, _ = batch()
    assert_close(teacher(images), model(images), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="has 6 classes, but the data has 7"):
        build_teacher(str(tmp_path / "teacher"), 7, MEAN, STD)


def test_positions_pair_blocks_by_relative_depth():
    student, teacher = build(depths=(2, 1)), build("pooling", depths=(4, 3))
    first, last, second = "stages.0.blocks.1", "stages.0.blocks.3", "stages.1.blocks.2"
    assert match_blocks(student, teacher, "last") == [(first, last), ("stages.1.blocks.0", second)]
    shallow = match_blocks(build(depths=(6, 1)), build("pooling", depths=(2, 1)), "all")
    assert [theirs[-1] for _, theirs in shallow[:6]] == ["0", "0", "0", "1", "1", "1"]
    pairs = match_blocks(student, teacher, "all")
    assert pairs == [("stages.0.blocks.0", first), (first, last), ("stages.1.blocks.0", second)]
    assert match_blocks(student, teacher, (first,)) == [(first, last)]
    with pytest.raises(ValueError, match="are no blocks of the student"):
        match_blocks(student, teacher, ["stages.0.blocks.5"])
    with pytest.raises(ValueError, match="2 stages and the module teacher 3"):
        match_blocks(student, build("pooling", depths=(1, 1, 1), dims=(8, 8, 8)), "last")


def test_timm_poolformer_is_a_module_teacher_and_other_families_are_refused():
    with torch.device("meta"):
        poolformer = timm.create_model("poolformer_s12")
        assert [len(stage) for stage in block_names(poolformer)] == [2, 2, 6, 2]
        with pytest.raises(ValueError, match="ResNet is not known as a module teacher"):
            block_names(timm.create_model("resnet18"))


@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone_reaches_the_student_and_never_the_teacher(term):
    student, teacher = build(), Teacher(build("attention", seed=1), MEAN, STD)
    images, targets = batch()
    with Objective(student, {term: 2.0}, teacher, teacher, positions="all") as objective:
        terms = objective(images, targets)
    assert set(terms) == {"loss", "output", term}
    assert_close(terms["loss"], 2 * terms[term])
    terms["loss"].backward()
    gradients = [p.grad for name, p in student.named_parameters() if "token_mixer" in name]
    assert len(gradients) == 6
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_whole_objective_gives_every_parameter_a_gradient_and_adds_up():
    student, teacher = build(), Teacher(build("pooling", seed=1), MEAN, STD)
    for name, parameter in student.named_parameters():
        if "token_mixer" in name:  # a fresh affine puts out zero, so that nothing reaches the norm before it
            nn.init.normal_(parameter, 0.5)
    weights = dict(zip(TERMS, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), strict=True))
    images, targets = batch()
    with Objective(student, weights, teacher, teacher) as objective:
        terms = objective(images, targets, scale=0.5)
    expected = sum(w * terms[name] * (0.5 if name in IMITATION else 1) for name, w in weights.items())
    assert_close(terms["loss"], expected)
    assert_close(terms["output"], student(images))
    terms["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert [name for name, g in gradients.items() if g is None or not g.isfinite().all() or not g.abs().max() > 0] == []


def test_module_teacher_rests_while_imitation_is_off():
    student, teacher = build(), Teacher(build("pooling", seed=1), MEAN, STD)
    other = copy.deepcopy(teacher)
    calls = []
    other.register_forward_hook(lambda *_: calls.append(1))
    images, targets = batch()
    with Objective(student, {"soft": 1.0, "block": 1.0}, teacher, other) as objective:
        assert "block" in objective(images, targets)
        assert len(calls) == 1
        assert "block" not in objective(images, targets, scale=0.0)
        assert len(calls) == 1


def test_missing_teachers_are_named_before_the_first_step():
    with pytest.raises(ValueError, match=r"\['soft'\] need a logit teacher"):
        Objective(build(), {"soft": 1.0})
    with pytest.raises(ValueError, match=r"\['block', 'mixer'\] need a module teacher"):
        Objective(build(), {"block": 1.0, "mixer": 1.0})


def test_imitation_schedules():
    assert imitation_scale("constant", 0.99) == 1
    assert [imitation_scale("first_phase", p, phase=0.3) for p in (0.0, 0.29, 0.3, 0.9)] == [1, 1, 0, 0]
    assert [imitation_scale("cosine", p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


def test_start_from_gives_the_student_its_teachers_function_but_for_the_mixers():
    student, teacher = build("affine", seed=0), build("pooling", seed=1)
    riformer.start_from(student, teacher.state_dict())
    missing = student.state_dict().keys() - teacher.state_dict().keys()
    assert missing == {
        f"stages.{b}.token_mixer.{p}" for b in ("0.blocks.0", "0.blocks.1", "1.blocks.0") for p in ("weight", "bias")
    }
    assert_close({k: student.state_dict()[k] for k in teacher.state_dict()}, dict(teacher.state_dict()))
