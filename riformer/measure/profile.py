"""Where a network's time goes: the paper's latency analysis, built up step by step, and measured in place.

Built up: the network with only its embedding, downsampling and residual adds; then with its norms, its token mixers,
its MLPs and its head added one after another. The paper's figure does this for a ViT-B, without pooling and head.
In place: the whole network, with a clock before and after every part of every block.

Both take turns in one run with the network without clocks. The parts measured in place must add up to the time of the
network without clocks; the result says so where they differ by more than 5 %.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from riformer.distill.families import Family, block_names, family_of
from riformer.measure.cost import count_macs_by_module
from riformer.runtime.latency import Spread

TOLERANCE = 0.05


EMBEDDING = re.compile(r"stem|patch_embed(\.\d+)?|(stages|layers)\.\d+\.downsample")
HEAD = re.compile(r"norm|fc_norm|head(\.\w+)?")
KINDS = ("embedding", "norm", "token mixer", "MLP", "rest of the blocks", "head")
"""Kinds of parts. The rest of a block is what it does outside its parts: residual adds, layer scales, layout."""


@dataclass(frozen=True)
class Step:
    """A network with some of its parts: its time, and what the parts added last contribute to it, in ms."""

    name: str
    latency_ms: Spread
    added_ms: float


@dataclass(frozen=True)
class Module:
    """A part in place: median time in ms; multiply-accumulates and bytes (weights, inputs, outputs) of the batch."""

    name: str
    kind: str
    latency_ms: float
    macs: int
    num_bytes: int


@dataclass(frozen=True)
class Profile:
    """Result of `profile`. Times are of a batch, in ms.

    Attributes:
        whole_ms: the network without clocks.
        steps: the network built up.
        modules: the parts in place.
        hooked_ms: the network with clocks.
        sum_of_whole: the sum of the parts divided by `whole_ms`, median over the rounds.
        sum_ms: the sum of the parts.
        adds_up: whether `sum_of_whole` is 1 within 5 %.
        mixer_share_built_up: what token mixers add, as a share of the network without its head.
        mixer_share_in_place: time of the token mixers as a share of `sum_ms`.
    """

    whole_ms: Spread
    steps: list[Step]
    modules: list[Module]
    hooked_ms: Spread
    sum_of_whole: float
    sum_ms: float = field(init=False)
    adds_up: bool = field(init=False)
    mixer_share_built_up: float = field(init=False)
    mixer_share_in_place: float = field(init=False)

    def __post_init__(self) -> None:
        total = sum(m.latency_ms for m in self.modules)
        mixers = sum(m.latency_ms for m in self.modules if m.kind == "token mixer")
        body = self.steps[-2].latency_ms.median  # without the head, as in the paper
        for name, value in {
            "sum_ms": total,
            "adds_up": abs(self.sum_of_whole - 1) <= TOLERANCE,
            "mixer_share_built_up": next(s.added_ms for s in self.steps if s.name == "token mixer") / body,
            "mixer_share_in_place": mixers / total,
        }.items():
            object.__setattr__(self, name, value)

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Time in ms, share of the sum, multiply-accumulates and bytes of each kind of part."""
        return {
            kind: {
                "latency_ms": (ms := sum(m.latency_ms for m in self.modules if m.kind == kind)),
                "share": ms / self.sum_ms,
                "macs": sum(m.macs for m in self.modules if m.kind == kind),
                "num_bytes": sum(m.num_bytes for m in self.modules if m.kind == kind),
            }
            for kind in KINDS
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"kind": "profile", **asdict(self), "by_kind": self.by_kind()}


@torch.inference_mode()
def profile(model: nn.Module, images: Tensor, rounds: int = 15, seconds: float = 0.1) -> Profile:
    """The latency analysis of a model in eval mode.

    Args:
        model: of a class in FAMILIES; it is not changed.
        images: [N, C, H, W], on the model's device and in its type.
        rounds: turns of each network.
        seconds: least duration of a turn.

    Raises:
        ValueError: the model's class is not in FAMILIES.
    """
    family = family_of(model)
    model = deepcopy(model).eval()
    names = _called(model, _kinds(model, family), images)
    steps = _build_up(model, family)
    clocked = deepcopy(model)
    clocks = _Clocks(clocked, names, images.is_cuda)
    networks = {"whole": model, **steps, "hooked": clocked}
    runs = {name: partial(_seconds, network, images) for name, network in networks.items()}
    repeats = {}
    for name, run in runs.items():
        run()
        repeats[name] = max(1, round(seconds / run()))
    times: dict[str, list[float]] = defaultdict(list)
    in_place: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, run in runs.items():
            clocks.clear()
            times[name].append(1e3 * sum(run() for _ in range(repeats[name])) / repeats[name])
        for name, total in clocks.totals().items():  # "hooked" is the last of the runs
            in_place[name].append(1e3 * total / repeats["hooked"])
    spreads = {name: Spread.of(values) for name, values in times.items()}
    medians = {name: median(values) for name, values in in_place.items()}
    macs = {name: count * len(images) for name, count in count_macs_by_module(model, images.shape[1:]).items()}
    sizes = clocks.num_bytes
    modules = []
    for name, kind in names.items():
        if kind == "rest of the blocks":  # the block's own time, without its parts
            inside = [other for other in names if other.startswith(f"{name}.")]
            rest = macs.get(name, 0) - sum(macs.get(other, 0) for other in inside)
            modules.append(Module(name, kind, medians[name] - sum(medians[o] for o in inside), rest, sizes[name]))
        else:
            modules.append(Module(name, kind, medians[name], macs.get(name, 0), sizes[name]))
    before, built_up = [0.0] * rounds, []
    for name in steps:  # differences by round, because the machine's speed may change between rounds
        built_up.append(Step(name, spreads[name], median(a - b for a, b in zip(times[name], before, strict=True))))
        before = times[name]
    outermost = [in_place[name] for name in names if not any(name.startswith(f"{other}.") for other in names)]
    sums = [sum(values) for values in zip(*outermost, strict=True)]
    of_whole = median(a / b for a, b in zip(sums, times["whole"], strict=True))
    return Profile(spreads["whole"], built_up, modules, spreads["hooked"], of_whole)


def _parts(family: Family) -> dict[str, tuple[str, ...]]:
    """Module names inside a block by kind of part, in the order in which the network is built up."""
    return {"norm": family.norms, "token mixer": (family.mixer,), "MLP": (family.mlp,)}


def _kinds(model: nn.Module, family: Family) -> dict[str, str]:
    """The kind of each module that may get a clock: parts of blocks, the blocks themselves, embedding and head."""
    kinds = {}
    blocks = [name for stage in block_names(model) for name in stage]
    for name, module in model.named_modules():
        if isinstance(module, nn.Identity):
            continue
        if EMBEDDING.fullmatch(name) and not isinstance(module, nn.ModuleList):
            kinds[name] = "embedding"
        elif HEAD.fullmatch(name):
            kinds[name] = "head"
    for block in blocks:
        kinds[block] = "rest of the blocks"
        for kind, names in _parts(family).items():
            kinds |= {f"{block}.{name}": kind for name in names}
    return kinds


def _called(model: nn.Module, kinds: dict[str, str], images: Tensor) -> dict[str, str]:
    """Those that are called, without those inside another one of the same kind.

    Some heads are called as a whole, others by their parts.
    """
    called: list[str] = []
    hooks = [model.get_submodule(n).register_forward_hook(lambda *_, n=n: called.append(n)) for n in kinds]
    model(images)
    for hook in hooks:
        hook.remove()
    kinds = {n: kind for n, kind in kinds.items() if n in called}
    return {n: kind for n, kind in kinds.items() if kinds.get(n.rpartition(".")[0]) != kind}


class _Body(nn.Module):
    """A network without its head. Shape: [N, C, H, W] -> features."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)


def _build_up(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    """Networks with more and more of the parts; a missing part returns its input."""
    parts = list(_parts(family).values())
    steps: dict[str, nn.Module] = {}
    for i, name in enumerate(("embedding", *_parts(family))):
        network = deepcopy(model)
        for block in (network.get_submodule(b) for stage in block_names(network) for b in stage):
            for missing in chain(*parts[i:]):
                setattr(block, missing, _Pass())
        steps[name] = _Body(network)
    return {**steps, "head": model}


class _Pass(nn.Module):
    """Returns its first argument, whatever else it is given (attention masks, shapes)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class _Clocks:
    """A clock before and after each of the named modules of a model."""

    def __init__(self, model: nn.Module, names: dict[str, str], cuda: bool):
        self.cuda = cuda
        self.marks: dict[str, list[Any]] = defaultdict(list)
        self.num_bytes: dict[str, int] = defaultdict(int)
        for name in names:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(lambda *_, name=name: self.marks[name].append(self._now()))
            recurse = names[name] != "rest of the blocks"  # the weights of a block are counted with its parts
            module.register_forward_hook(lambda m, x, y, name=name, recurse=recurse: self._end(name, m, recurse, x, y))

    def clear(self) -> None:
        self.marks.clear()

    def totals(self) -> dict[str, float]:
        """Seconds since `clear`, of each module."""
        if self.cuda:
            torch.cuda.synchronize()
            elapsed: Callable[[Any, Any], float] = lambda a, b: a.elapsed_time(b) / 1e3  # noqa: E731
        else:
            elapsed = lambda a, b: b - a  # noqa: E731
        return {
            name: sum(elapsed(*pair) for pair in zip(marks[::2], marks[1::2], strict=True))
            for name, marks in self.marks.items()
        }

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _end(self, name: str, module: nn.Module, recurse: bool, inputs: Any, output: Any) -> None:
        self.marks[name].append(self._now())
        if name not in self.num_bytes:
            tensors = [*module.parameters(recurse), *(t for t in (*inputs, output) if isinstance(t, Tensor))]
            self.num_bytes[name] = sum(t.numel() * t.element_size() for t in tensors)


def _seconds(model: nn.Module, images: Tensor) -> float:
    began = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
