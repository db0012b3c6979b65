"""Taps, teachers and the objective on tiny networks."""

import copy
from functools import partialmethod
from typing import get_args, get_type_hints

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import riformer
from riformer.config import DistillConfig, ResearchConfig
from riformer.distill import losses
from riformer.distill.families import block_names
from riformer.distill.imitation import Imitation, fit_affines, match_blocks
from riformer.distill.objective import IMITATION, SCHEDULES, TERMS, Objective, imitation_scale
from riformer.distill.taps import tap
from riformer.distill.teachers import Ensemble, Teacher, build_teacher
from riformer.model.mixers import Affine

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
NAMES = ["stages.0.blocks.1", "stages.1.blocks.0.token_mixer"]


def build(mixer: str = "affine", seed: int = 0, **args) -> nn.Module:
    torch.manual_seed(seed)
    args = {"depths": (2, 1), "dims": (8, 16), "layer_scale_init": 0.5, "num_classes": 6, **args}
    return timm.create_model("riformer_s12", mixer=mixer, stem_patch=2, stem_stride=2, img_size=8, **args)


def objective(student: nn.Module, weights: dict, teacher=None, module_teacher=None, positions="last") -> Objective:
    """An objective whose module teacher is the logit teacher unless another one is given."""
    terms = [name for name in IMITATION if name in weights]
    imitation = Imitation(student, module_teacher or teacher, terms, 8, positions) if terms else None
    return Objective(student, weights, teacher, imitation)


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
    imitates = objective(compiled, {"block": 1.0}, Teacher(build("pooling"), MEAN, STD))
    with imitates, pytest.raises(RuntimeError, match="tap it before its first compiled call"):
        imitates(images, targets)


def test_tap_works_under_ddp(one_process_group):
    model = build()
    images, targets = batch()
    weights = {"soft": 1.0, "block": 1.0, "mixer": 1.0}
    plain = objective(model, weights, Teacher(build("pooling", 1), MEAN, STD))
    with plain:
        expected = plain(images, targets)
        expected["loss"].backward()
    gradient = model.stem.conv.weight.grad.clone()
    model.zero_grad()
    wrapped = objective(DistributedDataParallel(model), weights, Teacher(build("pooling", 1), MEAN, STD))
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


def test_teacher_sees_images_at_its_own_size_or_the_one_asked_for():
    model, sizes = build("pooling").eval(), []
    model.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    images = torch.randn(2, 3, 12, 12)
    config = model.pretrained_cfg
    logits = Teacher(model, config["mean"], config["std"])(images)
    Teacher(model, MEAN, STD, img_size=16)(images)
    assert sizes == [(2, 3, 8, 8), (2, 3, 16, 16)]
    resized = nn.functional.interpolate(images, (8, 8), mode="bicubic", antialias=True)
    assert_close(logits, model(resized), atol=1e-5, rtol=1e-5)


def test_a_compiled_teacher_is_still_seen_by_imitation(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    images, targets = batch()
    losses = []
    for compiled in (False, True):
        teacher = Teacher(build("pooling", 1), MEAN, STD, compile=compiled)
        with objective(build(), {"soft": 1.0, "block": 1.0, "mixer": 1.0}, teacher) as learns:
            losses.append([learns(images[:size], targets[:size])["loss"].detach() for size in (4, 2)])
        assert (teacher.model._compiled_call_impl is not None) is compiled
    assert_close(losses[0], losses[1])
    assert losses[0][0] != losses[0][1]


@pytest.mark.parametrize("weights", [(), (1.0, 1.0, 1.0), (3.0, 1.0, 4.0)])
def test_an_ensemble_pulls_like_the_weighted_sum_of_its_teachers(weights):
    teachers = [Teacher(build("pooling", seed), MEAN, STD) for seed in (1, 2, 3)]
    for teacher in teachers:
        nn.init.normal_(teacher.model.head.fc.weight)
    images, targets = batch()
    shares = [share / sum(weights or (3,)) for share in weights or (1, 1, 1)]
    gradients = []
    for learns, factors in (
        ([objective(build(), {"soft": 1.0}, Ensemble(teachers, weights))], [1]),
        ([objective(build(), {"soft": 1.0}, teacher) for teacher in teachers], shares),
    ):
        student = learns[0].student
        for one, factor in zip(learns, factors, strict=True):
            one.student = student
            (factor * one(images, targets)["loss"]).backward()
        gradients.append(student.head.fc.weight.grad)
    assert_close(*gradients)
    probabilities = [share * teacher(images).softmax(1) for share, teacher in zip(shares, teachers, strict=True)]
    assert_close(Ensemble(teachers, weights)(images).softmax(1), sum(probabilities))


def test_an_ensemble_of_wrong_shares_is_refused():
    teacher = Teacher(build("pooling"), MEAN, STD)
    for weights in ((1.0,), (1.0, 0.0)):
        with pytest.raises(ValueError, match="2 logit teachers take as many positive weights"):
            Ensemble([teacher, teacher], weights)


def test_a_module_teacher_in_the_ensemble_runs_once():
    teachers = [Teacher(build("pooling", seed), MEAN, STD) for seed in (1, 2)]
    calls = []
    teachers[1].model.stem.register_forward_hook(lambda *_: calls.append(1))
    images, targets = batch()
    with objective(build(), {"soft": 1.0, "block": 1.0}, Ensemble(teachers), teachers[1]) as learns:
        calls.clear()
        learns(images, targets)
    assert len(calls) == 1


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
    teacher = build_teacher(str(tmp_path / "teacher"), "abcdef", config["mean"], config["std"])
    images, _ = batch()
    assert_close(teacher(images), model(images), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="has 6 classes without names, but the data has 7"):
        build_teacher(str(tmp_path / "teacher"), "abcdefg", MEAN, STD)


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
    other = build("pooling", depths=(2, 3, 1), dims=(8, 8, 8))  # another number of stages: by depth in the network
    assert match_blocks(student, other, "all") == [
        ("stages.0.blocks.0", "stages.0.blocks.1"),
        (first, "stages.1.blocks.1"),
        ("stages.1.blocks.0", "stages.2.blocks.0"),
    ]


def test_an_unknown_family_is_refused_with_what_to_add():
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"the blocks of a ResNet are not known.*give FAMILIES in .* a line"),
    ):
        block_names(timm.create_model("resnet18"))


@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone_reaches_the_student_and_never_the_teacher(term):
    student, teacher = build(), Teacher(build("attention", seed=1), MEAN, STD)
    images, targets = batch()
    with objective(student, {term: 2.0}, teacher, positions="all") as learns:
        terms = learns(images, targets)
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
    with objective(student, weights, teacher) as learns:
        terms = learns(images, targets, scale=0.5)
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
    with objective(student, {"soft": 1.0, "block": 1.0}, teacher, other) as learns:
        assert "block" in learns(images, targets)
        assert len(calls) == 1
        assert "block" not in learns(images, targets, scale=0.0)
        assert len(calls) == 1


@pytest.mark.parametrize("roles", ["one in both", "one of an ensemble", "two"])
def test_known_logits_spare_the_logit_teacher_and_maps_come_from_one_run_of_the_module_teacher(roles):
    student, modules = build(), Teacher(build("pooling", seed=1), MEAN, STD)
    other = Teacher(build("attention", seed=2), MEAN, STD)
    logit = {"one in both": modules, "one of an ensemble": Ensemble([other, modules]), "two": other}[roles]
    calls = {"modules": 0, "other": 0}
    for name, teacher in (("modules", modules), ("other", other)):
        teacher.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    images, targets = batch()
    with objective(student, {"soft": 1.0, "block": 1.0}, logit, modules) as learns:
        expected = learns(images, targets)
        assert (calls["modules"], learns.teacher_batches) == (1, 1)
        calls.update(modules=0, other=0)
        known = logit(images)
        calls.update(modules=0, other=0)
        recalled = learns(images, targets, recall=lambda run: known)
        assert calls == {"modules": 1, "other": 0}
        assert learns.teacher_batches == 2
        assert_close(recalled, expected, atol=0, rtol=0)
        asked = learns(images, targets, recall=lambda run: run())
        assert calls["modules"] == 2
        assert_close(asked, expected, atol=0, rtol=0)
        calls.update(modules=0, other=0)
        late = learns(images, targets, scale=0.0, recall=lambda run: known)
        assert calls == {"modules": 0, "other": 0}
        assert learns.teacher_batches == 3
        assert_close(late["soft"], expected["soft"], atol=0, rtol=0)
        fresh = learns(images.flip(0), targets, recall=lambda run: known.flip(0))  # no map of another batch is left
        assert_close(fresh["block"], expected["block"])


def test_missing_teachers_are_named_before_the_first_step():
    with pytest.raises(ValueError, match=r"\['soft'\] need a logit teacher"):
        Objective(build(), {"soft": 1.0})
    with pytest.raises(ValueError, match=r"\['block', 'mixer'\] need a module teacher"):
        Objective(build(), {"block": 1.0, "mixer": 1.0})


def test_imitation_schedules():
    assert imitation_scale("constant", 0.99) == 1
    assert [imitation_scale("first_phase", p, phase=0.3) for p in (0.0, 0.29, 0.3, 0.9)] == [1, 1, 0, 0]
    assert [imitation_scale("cosine", p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: imitation_scale("linear", 0.5), r"schedule is 'linear'; allowed are constant, cosine, first_phase$"),
        (lambda: imitation_scale("first-phase", 0.5), r"schedule is 'first-phase'; .*did you mean 'first_phase'\?"),
        (lambda: losses.block(batch()[0], batch()[0], match="normalized"), r"did you mean 'normalised'\?"),
        (
            lambda: Imitation(build(), Teacher(build("pooling"), MEAN, STD), ["block"], 8, block_match="Raw"),
            r"block_match is 'Raw'; allowed are normalised, raw",
        ),
    ],
)
def test_a_misspelt_word_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_words_are_those_of_the_configuration():
    assert get_args(get_type_hints(ResearchConfig)["block_match"]) == losses.BLOCK_MATCHES
    assert get_args(get_type_hints(DistillConfig)["schedule"]) == SCHEDULES


def test_start_from_gives_the_student_its_teachers_function_but_for_the_mixers():
    student, teacher = build("affine", seed=0), build("pooling", seed=1)
    riformer.start_from(student, teacher.state_dict())
    missing = student.state_dict().keys() - teacher.state_dict().keys()
    assert missing == {
        f"stages.{b}.token_mixer.{p}" for b in ("0.blocks.0", "0.blocks.1", "1.blocks.0") for p in ("weight", "bias")
    }
    assert_close({k: student.state_dict()[k] for k in teacher.state_dict()}, dict(teacher.state_dict()))


def test_a_module_teacher_with_other_classes_gives_all_but_mixers_and_classifier():
    student, teacher = build(num_classes=3), build("pooling", seed=1)
    classifier = student.head.fc.weight.clone()
    riformer.start_from(student, teacher.state_dict())
    assert_close(student.head.fc.weight, classifier)
    assert_close(student.stages[1].state_dict()["blocks.0.mlp.fc1.weight"], teacher.stages[1].blocks[0].mlp.fc1.weight)


def test_the_student_starts_from_timms_poolformer():
    with torch.device("meta"):
        poolformer = timm.create_model("poolformer_s12")
    state = {key: torch.rand(()).expand(value.shape) for key, value in poolformer.state_dict().items()}
    student = timm.create_model("riformer_s12")
    riformer.start_from(student, state)
    assert_close(student.stages[3].blocks[1].mlp.fc2.weight, state["stages.3.blocks.1.mlp.fc2.weight"])


def test_affines_are_fitted_to_what_the_teachers_mixers_do():
    teacher, student = (build(seed=seed).double() for seed in (1, 2))
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "token_mixer" in name:
                parameter.normal_()
    images = [batch(4)[0].double(), torch.randn(3, 3, 8, 8, dtype=torch.float64)]
    fit_affines(student, Teacher(teacher, MEAN, STD), images)
    for own, theirs in zip(student.modules(), teacher.modules(), strict=True):
        if isinstance(own, Affine):
            assert_close(own.weight, theirs.weight, atol=1e-9, rtol=1e-9)
            assert_close(own.bias, theirs.bias, atol=1e-9, rtol=1e-9)


def test_no_affine_near_the_fitted_one_is_nearer_to_a_mixer():
    module_teacher, student = Teacher(build("pooling", seed=1), MEAN, STD), build(seed=2)
    images, _ = batch(16)
    fit_affines(student, module_teacher, [images])
    block = "stages.0.blocks.0"
    with torch.no_grad(), tap(module_teacher.model, [f"{block}.norm1", f"{block}.token_mixer"]) as outputs:
        module_teacher(images)
    affine = student.get_submodule(f"{block}.token_mixer")
    error = (affine(outputs[f"{block}.norm1"]) - outputs[f"{block}.token_mixer"]).square().mean()
    error.backward()
    assert_close(affine.weight.grad, torch.zeros(8), atol=1e-5, rtol=0)
    assert_close(affine.bias.grad, torch.zeros(8), atol=1e-5, rtol=0)
    assert error < 0.9 * outputs[f"{block}.token_mixer"].square().mean()  # of an affine at its start


def test_affines_are_not_fitted_to_a_teacher_of_another_width():
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0 has 8 channels, but the module teacher's 16"):
        fit_affines(build(), Teacher(build("pooling", dims=(16, 16)), MEAN, STD), [batch()[0]])
