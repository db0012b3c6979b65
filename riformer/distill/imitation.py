"""Module imitation: which blocks of a student and of its module teacher are compared, and how.

A module teacher of the student's sizes is compared directly. For a teacher of another family or size, its outputs are
brought to [N, C, H, W], the finer of the two token grids is pooled to the coarser one, and the student's map goes
through a 1x1 convolution to the teacher's width. These projections are trained with the student and dropped at the end.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riformer.distill import losses
from riformer.distill.families import block_names, family_of
from riformer.distill.taps import tap, unwrapped
from riformer.distill.teachers import Teacher
from riformer.model.mixers import Affine

TERMS = ("block", "mixer", "relation")


def match_blocks(student: nn.Module, teacher: nn.Module, positions: str | Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of block names (student's, teacher's) that imitation compares.

    `positions` is "last" (of each of the student's stages), "all", or a list of the student's block names. A block
    imitates the teacher's block at the same relative depth of its stage; where the two networks have different numbers
    of stages, at the same relative depth of the whole network.

    Choice: "last" is the default because the authors' figure draws one position in each stage.

    Raises:
        ValueError: a family is unknown, or a position is not a block of the student.
    """
    stages, teacher_stages = block_names(student), block_names(teacher)
    if len(stages) == len(teacher_stages):
        parts = list(zip(stages, teacher_stages, strict=True))
    else:
        parts = [([*chain(*stages)], [*chain(*teacher_stages)])]
    pairs = {
        block: teacher_blocks[ceil((i + 1) * len(teacher_blocks) / len(blocks)) - 1]
        for blocks, teacher_blocks in parts
        for i, block in enumerate(blocks)
    }
    if positions == "all":
        chosen = list(pairs)
    elif positions == "last":
        chosen = [stage[-1] for stage in stages]
    else:
        chosen = [positions] if isinstance(positions, str) else list(positions)
    unknown = [block for block in chosen if block not in pairs]
    if unknown or not chosen:
        raise ValueError(f"positions {unknown or chosen} are no blocks of the student; use last, all or {list(pairs)}")
    return [(block, pairs[block]) for block in chosen]


class Imitation:
    """The pairs of blocks of a student and a module teacher, and the loss terms between them.

    `projections` holds the 1x1 convolutions, and is empty when all widths agree. They belong to the optimiser and to
    the state of a training, never to a saved model.

    Args:
        student: the model that learns, plain or wrapped by torch.compile (not yet called).
        teacher: the module teacher.
        terms: which of block, mixer and relation are computed.
        img_size: height and width of the student's images, pixels.
        positions: the student's blocks that imitate, see `match_blocks`.
        block_match: see `losses.block`.
        relation_tokens: see `losses.relation`.
        seed: of the projections' initial weights.

    Raises:
        ValueError: the teacher's family is unknown, a position is not a block of the student, or `block_match` is
            unknown.
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
        losses.check_choice("block_match", block_match, losses.BLOCK_MATCHES)
        self.student, self.teacher = unwrapped(student), teacher
        self.size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.pairs = match_blocks(self.student, teacher.model, positions)
        mixer, teacher_mixer = (family_of(model).imitated_mixer for model in (self.student, teacher.model))
        mixers = [(f"{block}.{mixer}", f"{teacher_block}.{teacher_mixer}") for block, teacher_block in self.pairs]
        self.modules = {name: mixers if name == "mixer" else self.pairs for name in TERMS if name in terms}
        self._losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "block": lambda student, teacher: losses.block(student, teacher, block_match),
            "mixer": losses.mixer,
            "relation": lambda student, teacher: losses.relation(student, teacher, relation_tokens),
        }
        self._student_outputs: dict[str, Tensor] = {}
        self._teacher_outputs: dict[str, Tensor] = {}
        self.shapes = self._map_shapes()
        self.projections = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, shapes in self.shapes.items():
                for i, ((width, *_), (teacher_width, *_)) in enumerate(shapes):
                    if width != teacher_width and name != "relation":  # relation compares tokens of any width
                        self.projections[f"{name}{i}"] = nn.Conv2d(width, teacher_width, 1)
        self.projections.to(next(self.student.parameters()).device)

    @torch.no_grad()
    def _map_shapes(self) -> dict[str, list[tuple[torch.Size, ...]]]:
        """(C, H, W) of the two maps of each pair, for each term, from one image through both models."""
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
        """Inside, forward passes of student and teacher record the outputs that `terms` compares."""
        names, teacher_names = zip(*[pair for pairs in self.modules.values() for pair in pairs], strict=True)
        with (
            tap(self.student, names) as self._student_outputs,
            tap(self.teacher.model, teacher_names) as self._teacher_outputs,
        ):
            yield

    def forget(self) -> None:
        """Drops the recorded outputs."""
        self._student_outputs.clear()
        self._teacher_outputs.clear()

    @property
    def teacher_ran(self) -> bool:
        """Whether the teacher has run since `forget`; it may have run as a logit teacher."""
        return bool(self._teacher_outputs)

    def terms(self) -> dict[str, Tensor]:
        """The terms of the last forward passes of student and teacher.

        Choice: the mean over the pairs, so that a weight means the same with one pair as with many.

        Raises:
            RuntimeError: the student's outputs were not recorded.
        """
        if not self._student_outputs:
            raise RuntimeError("the student ran but its modules were not seen: tap it before its first compiled call")
        return {
            name: torch.stack([self._term(name, i, *pair) for i, pair in enumerate(pairs)]).mean()
            for name, pairs in self.modules.items()
        }

    def _term(self, name: str, i: int, module: str, teacher_module: str) -> Tensor:
        student, teacher = self._maps(module, teacher_module)
        if f"{name}{i}" in self.projections:
            student = self.projections[f"{name}{i}"](student)
        grid = [min(sizes) for sizes in zip(student.shape[-2:], teacher.shape[-2:], strict=True)]
        return self._losses[name](_pooled(student, grid), _pooled(teacher, grid))

    def _maps(self, module: str, teacher_module: str) -> tuple[Tensor, Tensor]:
        return _as_map(self._student_outputs[module], self.student, self.size), _as_map(
            self._teacher_outputs[teacher_module], self.teacher.model, self.teacher.size
        )

    def describe(self) -> list[str]:
        """A line for each pair of blocks: their names, and how their maps are made comparable."""
        lines = []
        for i, (block, teacher_block) in enumerate(self.pairs):
            (width, *grid), (teacher_width, *teacher_grid) = next(iter(self.shapes.values()))[i]
            projected = any(f"{name}{i}" in self.projections for name in self.modules)
            how = [f"projected from {width} to {teacher_width} channels"] if projected else []
            if grid != teacher_grid:
                coarser = map(min, grid, teacher_grid)
                how += [f"{_by(grid)} and {_by(teacher_grid)} tokens pooled to {_by(coarser)}"]
            lines.append(f"{block} imitates {teacher_block}" + (f" ({'; '.join(how)})" if how else ""))
        return lines


@torch.no_grad()
def fit_affines(
    student: nn.Module,
    teacher: Teacher,
    batches: Iterable[Tensor],
    over_processes: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> None:
    """Sets each affine of the student to the s and t that come nearest to its teacher's mixer, in place.

    Least squares over all images and tokens, channel by channel: `(s - 1) y + t` approximates what the mixer of the
    teacher's block of the same name computes from the norm's output y. Both networks have the same sizes.
    `over_processes` takes the mean of a tensor over the processes, each of which has its own share of the images.

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
    """A module's output as a map, without class tokens.

    Shape: [N, C, H, W], [N, H, W, C] or [N, tokens, C], depending on the model's family -> [N, C, H, W].
    """
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if family_of(model).channels_last else output
    tokens = output[:, getattr(model, "num_prefix_tokens", 0) :].transpose(1, 2)
    height = round((tokens.shape[-1] * img_size[0] / img_size[1]) ** 0.5)
    return tokens.unflatten(-1, (height, -1))
