"""The weights from which a training starts: those of a module teacher, or of any other model."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from riformer.model.keys import fit_state
from riformer.model.metaformer import LayerScale
from riformer.model.mixers import Affine, Identity
from riformer.model.weights import load_strict

logger = logging.getLogger(__name__)


def start_from(student: nn.Module, teacher_state: Mapping[str, Tensor] | nn.Module) -> None:
    """Gives the student every tensor of its module teacher but the mixers' (the paper's weight initialisation).

    The student's own mixers keep their fresh values. Where the teacher is given as a model, affines of the student take
    the value of its identity mixers, s = 2 and t = 0. The classifier follows the class names, as in `start_at`.

    Args:
        student: any network of this package.
        teacher_state: the teacher's state dict, or the teacher.

    Raises:
        ValueError: anything else differs between the two.
    """
    mixers = {key: tensor for key, tensor in student.state_dict().items() if ".token_mixer." in key}
    added = _training_form(teacher_state, student) if isinstance(teacher_state, nn.Module) else {}
    taken = {key: value for key, value in _state_of(teacher_state, student).items() if ".token_mixer." not in key}
    source = "module teacher, from whose weights the student is to start,"
    other = _other_classifier(student, teacher_state, taken, "module teacher")
    load_strict(student, {**mixers, **added, **taken, **other}, source)


def start_at(model: nn.Module, start: Mapping[str, Tensor] | nn.Module, source: str) -> None:
    """Gives the model the weights that training is to start from: global filters and GFNet's positions resampled.

    The classifier's rows are matched by name where both models carry class names. It stays fresh where the start does
    not know all classes, or without names has another number of them. A start in deploy form, given as a model, fits a
    model in training form: an identity mixer is the affine s = 2, t = 0, and no layer scale is the scale 1. A start
    that computes something else than the model with its weights is reported by a warning.

    Args:
        model: the model to train.
        start: a state dict, or the model that has the weights.
        source: what messages call the start.

    Raises:
        ValueError: anything else differs.
    """
    state = _state_of(start, model)
    if isinstance(start, nn.Module):
        state = {**_training_form(start, model), **state}
    other = _other_classifier(model, start, state, source)
    load_strict(model, {**state, **other}, source)
    if isinstance(start, nn.Module) and not other:
        _warn_of_another_function(model, start, source)


def _state_of(given: Mapping[str, Tensor] | nn.Module, model: nn.Module) -> dict[str, Tensor]:
    return fit_state(given.state_dict() if isinstance(given, nn.Module) else given, model)


def _training_form(start: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """What the training form `model` has and the deploy form `start` lacks, with values that compute the same."""
    added: dict[str, Tensor] = {}
    modules = dict(start.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, Affine) and isinstance(modules.get(name), Identity):
            added[f"{name}.weight"] = torch.full_like(module.weight, 2)
            added[f"{name}.bias"] = torch.zeros_like(module.bias)
        elif isinstance(module, LayerScale) and isinstance(modules.get(name), nn.Identity):
            added[f"{name}.scale"] = torch.ones_like(module.scale)
    return added


@torch.no_grad()
def _warn_of_another_function(model: nn.Module, start: nn.Module, source: str) -> None:
    """Logs a warning when the two models give different logits."""
    outputs = []
    image = torch.randn(1, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    for network in (model, start):
        training = {module: module.training for module in network.modules()}
        outputs.append(network.eval()(image.to(next(network.parameters()))).cpu().double())
        for module, mode in training.items():
            module.training = mode
    difference = ((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max().clamp_min(1e-12)).item()
    if not difference <= 1e-3:
        logger.warning(
            "%s computes another function than the model that starts from its weights: logits differ by %.0f %% of the "
            "largest (a timm PoolFormer averages before the head's norm, as pool_first=True does; another image size "
            "resamples filters)", source, 100 * difference
        )  # fmt: skip


def _other_classifier(
    model: nn.Module, start: Mapping[str, Tensor] | nn.Module, state: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """The classifier to take instead of the one in `state`, where the classes are others or in another order."""
    heads = classifier_names(model)
    keys = [key for key in model.state_dict() if key.rpartition(".")[0] in heads and key in state]
    own = {key: tensor for key, tensor in model.state_dict().items() if key in keys}
    names, theirs = (list(_names(network)) for network in (model, start))
    if names == theirs or not names or not theirs or any(len(state[key]) != len(theirs) for key in keys):
        return {key: tensor for key, tensor in own.items() if state[key].shape != tensor.shape}
    if unknown := [name for name in names if name not in theirs]:
        logger.info("%s does not know the class %s: the classifier starts fresh", source, unknown[0])
        return own
    logger.info("%s has its %d classes in another order: its classifier is matched by name", source, len(theirs))
    rows = [theirs.index(name) for name in names]
    return {key: state[key][rows] for key in keys}


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers that give the logits; none where the model has no classes."""
    names = model.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names or ())


def _names(network: Mapping[str, Tensor] | nn.Module) -> tuple[str, ...]:
    return tuple(getattr(network, "pretrained_cfg", {}).get("label_names") or ())
