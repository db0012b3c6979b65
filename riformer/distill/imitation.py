"""Module imitation: which blocks of a student and of its module teacher are compared, and how their outputs meet.

A module teacher of the student's sizes is compared as it is. Of another family or size, its outputs are brought to
[N, C, H, W], the finer of two token grids is pooled to the coarser, and the student's map goes through a 1x1
convolution to the teacher's width. These projections are trained with the student and dropped at the end.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riformer.distill import losses
from riformer.distill.taps import tap, unwrapped
from riformer.distill.teachers import Teacher
from riformer.model.mixers import Affine

TERMS = ("block", "mixer", "relation")


@dataclass(frozen=True)
class Family:
    """How the models of a class name their parts, and what their modules put out.

    `blocks` is the pattern of a block's module name, with the groups (stage, index), or (index) for a model without
    stages; `mixer` the module inside a block that puts out what its token mixer adds to the residual stream. Outputs
    of three dimensions are tokens, [N, tokens, C], in any family.
    """

    blocks: str
    mixer: str
    channels_last: bool = False


FAMILIES = {
    "MetaFormer": Family(
        r"stages\.(\d+)\.blocks\.(\d+)", "token_mixer"
    ),  # ours; timm's PoolFormer, ConvFormer, CAFormer
    "GFNet": Family(r"blocks\.(\d+)\.(\d+)", "filter", channels_last=True),
    "ConvNeXt": Family(r"stages\.(\d+)\.blocks\.(\d+)", "conv_dw"),
    # The attention module itself sees single windows; this is the first one behind it that sees the map.
    "SwinTransformer": Family(r"layers\.(\d+)\.blocks\.(\d+)", "drop_path1", channels_last=True),
    "VisionTransformer": Family(r"blocks\.(\d+)", "attn"),  # DeiT too
    "VisionTransformerDistilled": Family(r"blocks\.(\d+)", "attn"),
}


def family_of(model: nn.Module) -> Family:
    """How this model names its parts.

    Raises:
        ValueError: its class is not in FAMILIES; the message says what to add.
    """
    name = type(model).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"{name} is not known as a module teacher; known are {sorted(FAMILIES)}. To add it, give FAMILIES in "
            f"riformer/distill/imitation.py a line with the pattern of its block names and the mixer's name in a block"
        )
    return FAMILIES[name]


def block_names(model: nn.Module) -> list[list[str]]:
    """Module names of the blocks, a list for each stage; a model without stages has one.

    Raises:
        ValueError: the model's class is not in FAMILIES.
    """
    pattern = family_of(model).blocks
    stages: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        if found := re.fullmatch(pattern, name):
            stages.setdefault("".join(found.groups()[:-1]), []).append(name)
    return list(stages.values())


def match_blocks(student: nn.Module, teacher: nn.Module, positions: str | Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of block names (student's, teacher's) that imitation compares.

    `positions` is "last" (of each of the student's stages), "all", or a list of the student's block names. A block
    imitates the teacher's block at the same relative depth of the stage; of the whole network, where the two have
    different numbers of stages.

    Choice: "last" as default; the authors' figure draws one position a stage.

    Raises:
        ValueError: the teacher's family is unknown, or a position is not a block of the student.
    """
    own, other = block_names(student), block_names(teacher)
    parts = list(zip(own, other, strict=True)) if len(own) == len(other) else [([*chain(*own)], [*chain(*other)])]
    pairs = {
        block: theirs[ceil((i + 1) * len(theirs) / len(ours)) - 1]
        for ours, theirs in parts
        for i, block in enumerate(ours)
    }
    if positions == "all":
        chosen = list(pairs)
    elif positions == "last":
        chosen = [stage[-1] for stage in own]
    else:
        chosen = [positions] if isinstance(positions, str) else list(positions)
    unknown = [block for block in chosen if block not in pairs]
    if unknown or not chosen:
        raise ValueError(f"positions {unknown or chosen} are no blocks of the student; use last, all or {list(pairs)}")
    return [(block, pairs[block]) for block in chosen]


class Imitation:
    """The pairs of a student and a module teacher, and the terms between them.

    `projections` holds the 1x1 convolutions, empty when all widths agree; they belong to the optimiser and to the state
    of a training, never to a saved model.

    Args:
        student: the model that learns, plain or wrapped by torch.compile (not yet called).
        teacher: the module teacher.
        terms: which of block, mixer and relation are computed.
        img_size: height and width of the student's images, pixels.
        positions: blocks that imitate, see `match_blocks`.
        block_match: see `losses.block`.
        relation_tokens: see `losses.relation`.
        seed: of the projections' first weights.

    Raises:
        ValueError: the teacher's family is unknown, or a position is not a block of the student.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        terms: Collection[str],
        img_size: int | tuple[int, int],
        positions: str | Sequence[str] = "last",
        block_match: str = "normalised",
        relation_tokens: int = 196,
        seed: int = 0,
    ):
        self.student, self.teacher = unwrapped(student), teacher
        self.size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.pairs = match_blocks(self.student, teacher.model, positions)
        mixer, their_mixer = family_of(self.student).mixer, family_of(teacher.model).mixer
        mixers = [(f"{ours}.{mixer}", f"{theirs}.{their_mixer}") for ours, theirs in self.pairs]
        self.modules = {name: mixers if name == "mixer" else self.pairs for name in TERMS if name in terms}
        self._losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "block": lambda student, teacher: losses.block(student, teacher, block_match),
            "mixer": losses.mixer,
            "relation": lambda student, teacher: losses.relation(student, teacher, relation_tokens),
        }
        self._own: dict[str, Tensor] = {}
        self._theirs: dict[str, Tensor] = {}
        self.shapes = self._look()
        self.projections = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, shapes in self.shapes.items():
                for i, (ours, theirs) in enumerate(shapes):
                    if ours[0] != theirs[0] and name != "relation":  # which compares tokens, whatever their width
                        self.projections[f"{name}{i}"] = nn.Conv2d(ours[0], theirs[0], 1)
        self.projections.to(next(self.student.parameters()).device)

    @torch.no_grad()
    def _look(self) -> dict[str, list[tuple[torch.Size, ...]]]:
        """(C, H, W) of the maps of each pair, for each term, from one image through both models."""
        like = next(self.student.parameters())
        training = self.student.training
        image = torch.zeros(1, 3, *self.size, device=like.device, dtype=like.dtype)
        with self.tapped():
            self.student.eval()(image)
            self.student.train(training)
            self.teacher.model(self.teacher.see(image))
            return {
                name: [tuple(x.shape[1:] for x in self._maps(*pair)) for pair in pairs]
                for name, pairs in self.modules.items()
            }

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Inside, forward passes of student and teacher leave behind what `terms` compares."""
        ours, theirs = zip(*[pair for pairs in self.modules.values() for pair in pairs], strict=True)
        with tap(self.student, ours) as self._own, tap(self.teacher.model, theirs) as self._theirs:
            yield

    def forget(self) -> None:
        """Drops what the last forward passes left behind."""
        self._own.clear()
        self._theirs.clear()

    @property
    def teacher_ran(self) -> bool:
        """Whether the teacher ran since, which it may have done as a logit teacher."""
        return bool(self._theirs)

    def terms(self) -> dict[str, Tensor]:
        """The terms of the last forward passes of student and teacher.

        Choice: the mean over the pairs, so that a weight means the same with one pair as with many.

        Raises:
            RuntimeError: the student's modules were not seen.
        """
        if not self._own:
            raise RuntimeError("the student ran but its modules were not seen: tap it before its first compiled call")
        return {
            name: torch.stack([self._term(name, i, *pair) for i, pair in enumerate(pairs)]).mean()
            for name, pairs in self.modules.items()
        }

    def _term(self, name: str, i: int, ours: str, theirs: str) -> Tensor:
        student, teacher = self._maps(ours, theirs)
        if f"{name}{i}" in self.projections:
            student = self.projections[f"{name}{i}"](student)
        grid = [min(sizes) for sizes in zip(student.shape[-2:], teacher.shape[-2:], strict=True)]
        return self._losses[name](_pooled(student, grid), _pooled(teacher, grid))

    def _maps(self, ours: str, theirs: str) -> tuple[Tensor, Tensor]:
        return _as_map(self._own[ours], self.student, self.size), _as_map(
            self._theirs[theirs], self.teacher.model, self.teacher.size
        )

    def describe(self) -> list[str]:
        """A line for each pair of blocks: their names, and what is done to bring them together."""
        lines = []
        for i, (ours, theirs) in enumerate(self.pairs):
            (width, *grid), (their_width, *their_grid) = next(iter(self.shapes.values()))[i]
            projected = any(f"{name}{i}" in self.projections for name in self.modules)
            how = [f"projected from {width} to {their_width} channels"] if projected else []
            if grid != their_grid:
                how += [f"{_by(grid)} and {_by(their_grid)} tokens pooled to {_by(map(min, grid, their_grid))}"]
            lines.append(f"{ours} imitates {theirs}" + (f" ({'; '.join(how)})" if how else ""))
        return lines


@torch.no_grad()
def fit_affines(
    student: nn.Module,
    teacher: Teacher,
    batches: Iterable[Tensor],
    over_processes: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> None:
    """Gives each affine of the student the s and t that are nearest to its teacher's mixer, in place.

    Least squares over all images and tokens, channel by channel: `(s - 1) y + t` for what the mixer in the block of the
    same place makes of the norm's output y. Both are networks of one size. `over_processes` takes the mean of a tensor
    over the processes, each of which has its own share of the images.

    Choice: not in the paper, whose affines start at s = 1, t = 0.

    Shape: each batch [N, 3, H, W].

    Raises:
        ValueError: the teacher has no block of that name, or its norm has another width.
    """
    affines = {
        name.removesuffix(".token_mixer"): module
        for name, module in unwrapped(student).named_modules()
        if isinstance(module, Affine)
    }
    sums = {name: torch.zeros(5, len(affine.weight), dtype=torch.float64) for name, affine in affines.items()}
    names = [f"{block}.{part}" for block in affines for part in ("norm1", "token_mixer")]
    with tap(teacher.model, names) as outputs:
        for images in batches:
            teacher(images)
            for block, total in sums.items():
                y, mixed = (outputs[f"{block}.{part}"].double() for part in ("norm1", "token_mixer"))
                if y.shape[1] != total.shape[1]:
                    raise ValueError(f"{block} has {total.shape[1]} channels, but the module teacher's {y.shape[1]}")
                moments = (torch.ones_like(y), y, mixed, y * y, y * mixed)
                total += torch.stack([moment.sum((0, 2, 3)) for moment in moments]).cpu()
    for block, affine in affines.items():
        count, y, mixed, square, product = over_processes(sums[block].to(affine.weight.device))
        slope = (product - y * mixed / count) / (square - y * y / count).clamp(min=1e-12 * count)
        affine.weight.copy_(1 + slope)
        affine.bias.copy_((mixed - slope * y) / count)


def _pooled(x: Tensor, grid: list[int]) -> Tensor:
    return x if list(x.shape[-2:]) == grid else F.adaptive_avg_pool2d(x, grid)


def _by(grid: Iterable[int]) -> str:
    return " x ".join(map(str, grid))


def _as_map(output: Tensor, model: nn.Module, img_size: tuple[int, int]) -> Tensor:
    """A module's output as a map, class tokens left out.

    Shape: [N, C, H, W], [N, H, W, C] or [N, tokens, C], as the model's family has it -> [N, C, H, W].
    """
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if family_of(model).channels_last else output
    tokens = output[:, getattr(model, "num_prefix_tokens", 0) :].transpose(1, 2)
    height = round((tokens.shape[-1] * img_size[0] / img_size[1]) ** 0.5)
    return tokens.unflatten(-1, (height, -1))
