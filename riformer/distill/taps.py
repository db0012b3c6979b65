"""Records the outputs of named modules while a model runs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile, whose module names have no prefix."""
    if isinstance(model, DistributedDataParallel):
        return unwrapped(model.module)
    return unwrapped(cast(nn.Module, model._orig_mod)) if hasattr(model, "_orig_mod") else model


@contextmanager
def tap(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Yields a dict that each forward pass fills with the outputs of the modules in `names`, gradients attached.

    Names are those of the model without wrappers, also when DDP or torch.compile wraps it. A compiled model must be
    tapped before its first call, because torch.compile ignores hooks that are added later; the dict then stays empty.

    Raises:
        ValueError: a name that the model does not have; before any forward pass.
    """
    modules = dict(unwrapped(model).named_modules())
    names = list(names)
    for name in names:
        if name not in modules:
            raise ValueError(f"no module {name!r} to tap; near are {get_close_matches(name, modules, n=5)}")
    outputs: dict[str, Tensor] = {}
    hooks = [modules[name].register_forward_hook(partial(_record, outputs, name)) for name in names]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _record(outputs: dict[str, Tensor], name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
    outputs[name] = output
