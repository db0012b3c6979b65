"""Copies of modules with plain parameters, as the deploy form has them."""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

Module = TypeVar("Module", bound=nn.Module)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@torch.no_grad()
def plain_copy(module: Module) -> Module:
    """A copy in which every parametrized tensor (weight norm, spectral norm, ...) is the tensor that it computes to.

    The values are those of eval mode. `module` stays as it was.

    Raises:
        ValueError: a submodule has hooks, or a forward that was replaced on the instance: the copy would run them too.
    """
    for name, child in module.named_modules():
        if any(getattr(child, hooks) for hooks in _HOOKS) or "forward" in vars(child):
            raise ValueError(
                f"{name or type(module).__name__} has hooks or a replaced forward, which a fused copy would run as "
                f"well: fuse outside of `tap`, or remove them first (handle.remove(), prune.remove, "
                f"remove_weight_norm)"
            )
    copy = deepcopy(module)
    training = {child: child.training for child in copy.modules()}
    copy.eval()
    for child in list(copy.modules()):
        if is_parametrized(child):
            _compute(child)
    for child, mode in training.items():
        child.training = mode
    return copy


def _compute(module: nn.Module) -> None:
    """Replaces parametrized tensors by their values. The class changes, not its properties: the original shares it."""
    values = {name: getattr(module, name).clone() for name in module.parametrizations}
    trained = {name for name, own in module.parametrizations.items() if next(own.parameters(), None) is not None}
    module.__class__ = type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        if name in trained:
            module.register_parameter(name, nn.Parameter(value))
        else:
            module.register_buffer(name, value)
