"""Where a network's time goes: the paper's latency analysis, built up step by step and taken apart in place.

Built up: the network with only its embedding, downsampling and residual adds; then its norms put back, its token
mixers, its MLPs, and the head. The paper's figure does this for a ViT-B, without pooling and head.
Taken apart: the untouched network, with a clock before and behind every part of every block.

Both, and the network without clocks, take turns in one run. What the clocks see must add up to what the network takes
without them; where it does not within 5 %, the result says so.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from riformer.distill.imitation import block_names, family_of
from riformer.measure.cost import count_macs_by_module
from riformer.measure.latency import Spread

TOLERANCE = 0.05


class Parts(NamedTuple):
    """Names inside a block, of norms, token mixer and MLP."""

    norm: tuple[str, ...] = ("norm1", "norm2")
    mixer: tuple[str, ...] = ("attn",)
    mlp: tuple[str, ...] = ("mlp",)


PARTS = {
    "VisionTransformer": Parts(),  # DeiT too
    "VisionTransformerDistilled": Parts(),
    "MetaFormer": Parts(mixer=("token_mixer",)),  # ours; timm's PoolFormer, ConvFormer, CAFormer
    "GFNet": Parts(mixer=("filter",)),
    "ConvNeXt": Parts(norm=("norm",), mixer=("conv_dw",)),
    "SwinTransformer": Parts(),  # cutting windows and putting them together is the block's own, among the rest
}
EMBEDDING = re.compile(r"stem|patch_embed(\.\d+)?|(stages|layers)\.\d+\.downsample")
HEAD = re.compile(r"norm|fc_norm|head(\.\w+)?")
KINDS = ("embedding", "norm", "token mixer", "MLP", "rest of the blocks", "head")
"""Kinds of parts. The rest of a block is what it does beside its parts: residual adds, layer scales, layout."""


@dataclass(frozen=True)
class Step:
    """A network with some of its parts: its time, and what the parts put back last add to it, in ms."""

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
    """What `profile` finds. Times are of a batch, in ms; `sum_of_whole` is the parts' sum over the whole, by round."""

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
        model: of a class in PARTS; it stays as it was.
        images: [N, C, H, W], on the model's device and in its type.
        rounds: turns of each network.
        seconds: how long a turn lasts at least.

    Raises:
        ValueError: the model's class is not known.
    """
    parts = _parts_of(model)
    model = deepcopy(model).eval()
    names = _called(model, _kinds(model, parts), images)
    timer: Callable[[nn.Module], Callable[[], float]] = lambda net: lambda: _seconds(net, images)  # noqa: E731
    runs: dict[str, Callable[[], float]] = {"whole": timer(model)}
    steps = _build_up(model, parts)
    runs |= {name: timer(network) for name, network in steps.items()}
    clocked = deepcopy(model)
    clocks = _Clocks(clocked, names, images.is_cuda)
    runs["hooked"] = timer(clocked)
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
        for name, total in clocks.totals().items():  # the hooked network came last
            in_place[name].append(1e3 * total / repeats["hooked"])
    spreads = {name: Spread.of(values) for name, values in times.items()}
    medians = {name: median(values) for name, values in in_place.items()}
    macs = {name: count * len(images) for name, count in count_macs_by_module(model, images.shape[1:]).items()}
    sizes = clocks.num_bytes
    modules = []
    for name, kind in names.items():
        if kind == "rest of the blocks":  # a block without what was measured inside it
            inside = [other for other in names if other.startswith(f"{name}.")]
            rest = macs.get(name, 0) - sum(macs.get(other, 0) for other in inside)
            modules.append(Module(name, kind, medians[name] - sum(medians[o] for o in inside), rest, sizes[name]))
        else:
            modules.append(Module(name, kind, medians[name], macs.get(name, 0), sizes[name]))
    before, found = [0.0] * rounds, []
    for name in steps:  # differences by round: the machine may change its pace between rounds
        found.append(Step(name, spreads[name], median(a - b for a, b in zip(times[name], before, strict=True))))
        before = times[name]
    outermost = [in_place[name] for name in names if not any(name.startswith(f"{other}.") for other in names)]
    sums = [sum(values) for values in zip(*outermost, strict=True)]
    of_whole = median(a / b for a, b in zip(sums, times["whole"], strict=True))
    return Profile(spreads["whole"], found, modules, spreads["hooked"], of_whole)


def _parts_of(model: nn.Module) -> Parts:
    name = type(model).__name__
    if name not in PARTS:
        raise ValueError(
            f"{name} cannot be taken apart; known are {', '.join(sorted(PARTS))}. To add it, give PARTS in "
            f"riformer/measure/profile.py the names of norms, token mixer and MLP inside its blocks"
        )
    family_of(model)  # which knows its blocks
    return PARTS[name]


def _kinds(model: nn.Module, parts: Parts) -> dict[str, str]:
    """What each module that may get a clock is: parts of blocks, the blocks themselves, embedding and head."""
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
        for kind, inside in zip(("norm", "token mixer", "MLP"), parts, strict=True):
            kinds |= {f"{block}.{part}": kind for part in inside}
    return kinds


def _called(model: nn.Module, kinds: dict[str, str], images: Tensor) -> dict[str, str]:
    """Those that are called, but none inside another of its kind: some heads are called whole, some by their pieces."""
    called: list[str] = []
    hooks = [model.get_submodule(n).register_forward_hook(lambda *_, n=n: called.append(n)) for n in kinds]
    model(images)
    for hook in hooks:
        hook.remove()
    found = {n: kind for n, kind in kinds.items() if n in called}
    return {n: kind for n, kind in found.items() if found.get(n.rpartition(".")[0]) != kind}


class _Body(nn.Module):
    """A network without its head. Shape: [N, C, H, W] -> features."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)


def _build_up(model: nn.Module, parts: Parts) -> dict[str, nn.Module]:
    """Networks with more and more of the parts; what is missing passes its input on."""
    steps: dict[str, nn.Module] = {}
    for i, name in enumerate(("embedding", "norm", "token mixer", "MLP")):
        network = deepcopy(model)
        for block in (network.get_submodule(b) for stage in block_names(network) for b in stage):
            for missing in (part for kind in parts[i:] for part in kind):
                setattr(block, missing, _Pass())
        steps[name] = _Body(network)
    return {**steps, "head": model}


class _Pass(nn.Module):
    """Returns its first argument, whatever else it is given (attention masks, shapes)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class _Clocks:
    """A clock before and behind each of the named modules of a model."""

    def __init__(self, model: nn.Module, names: dict[str, str], cuda: bool):
        self.cuda = cuda
        self.marks: dict[str, list[Any]] = defaultdict(list)
        self.num_bytes: dict[str, int] = defaultdict(int)
        for name in names:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(lambda *_, name=name: self.marks[name].append(self._now()))
            own = names[name] != "rest of the blocks"  # the weights of a block are its parts'
            module.register_forward_hook(lambda m, x, y, name=name, own=own: self._passed(name, m, own, x, y))

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

    def _passed(self, name: str, module: nn.Module, all_weights: bool, inputs: Any, output: Any) -> None:
        self.marks[name].append(self._now())
        if name not in self.num_bytes:
            tensors = [*module.parameters(all_weights), *(t for t in (*inputs, output) if isinstance(t, Tensor))]
            self.num_bytes[name] = sum(t.numel() * t.element_size() for t in tensors)


def _seconds(model: nn.Module, images: Tensor) -> float:
    began = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
