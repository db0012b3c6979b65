"""Every knob of a training, as frozen dataclasses. A `Recipe` holds them all; recipes.py makes recipes."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, get_type_hints

WITH_ROOT = ("fashion-mnist", "cifar10", "cifar100", "glyphs")
"""Data sets that lie in a folder which `data.root` may name."""


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they become tensors."""

    name: str = "digits"
    """data set: digits (built in), fashion-mnist, cifar10, cifar100, glyphs, or folder:PATH (PATH/train and PATH/val,
    or one flat folder of class folders that is split here)"""
    root: str = ""
    """folder where fashion-mnist, cifar10, cifar100 or glyphs lies, or is downloaded to; empty: ~/.cache/riformer, and
    before that the system's folder of fashion-mnist"""
    img_size: int = 224
    """height and width of the network's input, pixels"""
    crop_pct: float = 0.9
    """share of the resized image's side that the centre crop keeps in evaluation"""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """mean of the red, green and blue channel, of values in 0..1"""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """standard deviation of the red, green and blue channel, of values in 0..1"""
    val_fraction: float = 0.2
    """share of each class held out for validation when a folder has no val"""
    on_bad: Literal["error", "skip"] = "error"
    """what to do with images that cannot be read: stop and name them, or leave them out, counted and listed"""
    num_workers: int = 0
    """processes that decode and augment beside the training process"""


@dataclass(frozen=True)
class AugmentConfig:
    """What is drawn anew each time a training image is seen."""

    policy: Literal["timm", "warp"] = "timm"
    """timm: the settings below, image by image; warp, instead of them: whole batches on the training device, for glyphs
    and other small grey images (random scale, rotation, shear, shift, contrast, inversion, noise)"""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """smallest and largest share of the image's area in a random crop"""
    hflip: float = 0.5
    """probability of a horizontal flip; 0 where left and right have a meaning"""
    color_jitter: float = 0.4
    """strength of brightness, contrast and saturation jitter; unused when auto_augment is set"""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of an augmentation policy (this one is RandAugment 9/0.5); empty for none"""
    random_erasing: float = 0.25
    """probability that a rectangle is erased"""
    mixup: float = 0.8
    """alpha of mixup; 0 for none"""
    cutmix: float = 1.0
    """alpha of cutmix; 0 for none"""

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.policy == "timm" and bool(self.mixup or self.cutmix)


@dataclass(frozen=True)
class ModelConfig:
    """The network that is trained: a registered name, and arguments that differ from the name's own."""

    name: str = "riformer_s12"
    """model name, see `riformer list`, or any of timm's; the next seven settings are riformer_*'s"""
    mixer: str | tuple[str, ...] = "affine"
    """token mixer, see `riformer list`, or a list of one a stage or one a block; affine is RIFormer's training form"""
    depths: tuple[int, ...] | None = None
    """blocks in each stage; null keeps the name's own"""
    dims: tuple[int, ...] | None = None
    """channels in each stage; null keeps the name's own"""
    stem_patch: int | None = None
    """kernel of the first convolution, pixels; null keeps the name's own"""
    stem_stride: int | None = None
    """stride of the first convolution, pixels; null keeps the name's own"""
    down_patch: int | None = None
    """kernel of the convolutions between stages, tokens, their stride being 2; null keeps the name's own"""
    layer_scale_init: float | None = None
    """first value of the layer scales; null keeps the name's own"""
    drop_path_rate: float = 0.0
    """stochastic depth of the last block, rising linearly from 0 at the first"""
    args: dict[str, Any] = field(default_factory=dict, hash=False)
    """further arguments of the model's constructor, as JSON"""
    start: str = ""
    """weights to start from, named like distill.logit_teacher; a classifier for other classes starts anew"""


@dataclass(frozen=True)
class TeacherConfig:
    """The token-mixer network that a run trains for itself first, when a teacher is named "own"."""

    name: str = ""
    """its model name, any of timm's; empty for the student's own sizes with the next setting's mixer"""
    mixer: str = "pooling"
    """token mixer of the teacher, whose other sizes are the student's"""
    args: dict[str, Any] = field(default_factory=dict, hash=False)
    """further arguments of a named teacher's constructor, as JSON"""
    epochs: int = 120
    """epochs of the teacher's own training, on labels"""
    lr: float = 1e-3
    """peak learning rate of the teacher's own training"""


@dataclass(frozen=True)
class DistillConfig:
    """What the network learns from: weights of the terms, and the two teachers behind them."""

    logit_teacher: str | tuple[str, ...] = ""
    """whose logits are learned: "own" (trained first in the same run), a run folder, a model folder or file, timm:NAME
    for a pretrained model, timm:NAME@FILE for one with your weights, local-dir:FOLDER or hf-hub:NAME; a list of such
    for the mean of their probabilities; empty for none"""
    module_teacher: str = ""
    """whose blocks and mixers are imitated, and whose weights the student may start from; named like one logit
    teacher"""
    teacher_classes: str = ""
    """text file with the class names, one a line, of logit teachers that carry none, in the order of their outputs"""
    trust_teacher: bool = False
    """train even if a logit teacher does badly on the validation images, on which each is measured first"""
    teacher_img_size: int = 0
    """pixels at which teachers see the images; 0 for each one's own size, to which images are resized"""
    compile_teachers: bool = False
    """torch.compile the teachers"""
    start_from_teacher: bool = False
    """start from the module teacher's weights, all but its mixers"""
    label_weight: float = 1.0
    """weight of the cross-entropy to the label"""
    hard_weight: float = 0.0
    """weight of the cross-entropy to the logit teacher's arg-max"""
    soft_weight: float = 0.0
    """weight of the divergence from the logit teacher's probabilities"""
    temperature: float = 1.0
    """softens both sides of the soft term, which is multiplied by its square"""
    block_weight: float = 0.0
    """weight of the distance between block outputs (L_in')"""
    mixer_weight: float = 0.0
    """weight of the distance between mixer outputs (L_out)"""
    relation_weight: float = 0.0
    """weight of the distance between token-by-token cosine similarities of block outputs (L_rel)"""
    schedule: Literal["constant", "cosine", "first_phase"] = "constant"
    """how the three imitation weights go over training: constant, cosine to zero, or on for the first part only"""
    cache_augmentations: int = 0
    """augmentations of each image, taken in turns by the epochs, whose teacher outputs are kept, so that later epochs
    run without the logit teacher; 0 augments anew in every epoch and keeps none"""

    @property
    def logit_teachers(self) -> tuple[str, ...]:
        """The logit teachers, none, one or several."""
        named = (self.logit_teacher,) if isinstance(self.logit_teacher, str) else self.logit_teacher
        return tuple(name for name in named if name)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term, by its name."""
        suffix = "_weight"
        return {f.name.removesuffix(suffix): getattr(self, f.name) for f in fields(self) if f.name.endswith(suffix)}

    @property
    def trains_teacher(self) -> bool:
        """Whether the run trains a teacher of its own first."""
        return "own" in (*self.logit_teachers, self.module_teacher)


@dataclass(frozen=True)
class ResearchConfig:
    """Details of distillation that experiments vary; a training on your own data does not need them."""

    positions: str | tuple[str, ...] = "last"
    """blocks that imitate: last (of each stage), all, or names such as stages.0.blocks.1"""
    block_match: Literal["normalised", "raw"] = "normalised"
    """compare block outputs after a layer norm without parameters, or as they are"""
    relation_tokens: int = 196
    """most tokens of a map that the relation term compares; larger maps are average-pooled down to it"""
    phase: float = 0.5
    """share of training that the first_phase schedule lasts"""
    logit_teacher_weights: tuple[float, ...] = ()
    """weights of several logit teachers in the mean of their probabilities; empty for equal ones"""
    cache_top_k: int = 0
    """probabilities kept of each teacher output, the rest of its mass spread evenly over the other classes; 0 keeps all
    logits"""
    fit_affine_batches: int = 0
    """training batches on which the affines are fitted to the module teacher's mixers by least squares before the first
    step; 0 starts them at s = 1, t = 0"""


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are updated."""

    name: str = "adamw"
    """timm's name of the optimiser"""
    lr: float = 4e-3
    """peak learning rate, for the whole batch"""
    weight_decay: float = 0.05
    """weight decay, on matrices and kernels only, and on the whole of imitation's projections"""
    epochs: int = 300
    """passes over the training images"""
    warmup_epochs: float = 5.0
    """epochs of linear warm-up"""
    min_lr: float = 1e-5
    """learning rate at the end of the cosine"""
    batch_size: int = 4096
    """images in one optimiser step, over all processes and accumulation steps together"""
    accumulation: int = 1
    """parts that a process splits its share of the batch into, one after the other"""
    clip_grad: float = 0.0
    """largest norm of the gradient; 0 does not clip"""
    label_smoothing: float = 0.1
    """probability mass that the label term spreads over all classes"""
    ema_decay: float = 0.0
    """decay of the moving average of the weights, reached gradually, which is then what is evaluated and kept; 0 for
    none"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """fp32, or bf16 autocast"""
    channels_last: bool = False
    """keep maps with their channels innermost in memory, in which convolutions are often faster"""
    compile: bool = False
    """torch.compile the student"""


@dataclass(frozen=True)
class Recipe:
    """A complete configuration of one training."""

    name: str = "custom"
    """what reports call it"""
    seed: int = 0
    """decides initialisation, order, augmentation and every other draw"""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    research: ResearchConfig = field(default_factory=ResearchConfig)


MOVED = {f"distill.{f.name}": f"research.{f.name}" for f in fields(ResearchConfig)}
"""Knobs that had another place in earlier versions, with the place of today."""


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON types."""
    return asdict(recipe)


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe that an earlier version wrote, each under its name of today."""
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    for old, new in MOVED.items():
        (section, name), (new_section, new_name) = old.split("."), new.split(".")
        if name in (values.get(section) or {}):
            values.setdefault(new_section, {})[new_name] = values[section].pop(name)
    return values


def from_dict(values: dict[str, Any], cls: type = Recipe) -> Any:
    """The recipe that `to_dict` wrote. One that an earlier version wrote needs `upgrade` first.

    Raises:
        ValueError: a knob that does not exist, or a value of another type; the message names it.
    """
    known = get_type_hints(cls)
    for name in values:
        if name not in known:
            if (old := f"{_section(cls)}.{name}") in MOVED:
                raise ValueError(f"{old} is now {MOVED[old]}")
            raise ValueError(f"{cls.__name__} has no {name!r}; it has {sorted(known)}")
    built = {}
    for f in fields(cls):
        if f.name in values:
            value = values[f.name]
            kind = known[f.name]
            plain = {float: (int, float), int: int, str: str, bool: bool}.get(kind)
            if plain and (not isinstance(value, plain) or isinstance(value, bool) != (kind is bool)):
                raise ValueError(f"{cls.__name__}.{f.name} is {value!r}; it must be of type {kind.__name__}")
            nested = is_dataclass(kind) and isinstance(value, dict)
            built[f.name] = from_dict(value, kind) if nested else tuple(value) if isinstance(value, list) else value
    return cls(**built)


def _section(cls: type) -> str:
    """Where a recipe holds this class."""
    return next((name for name, kind in get_type_hints(Recipe).items() if kind is cls), "")


def check(recipe: Recipe) -> None:
    """Refuses settings that contradict each other or would have no effect.

    Raises:
        ValueError: names the settings, their values and what is allowed.
    """
    data, augment, distill, optim = recipe.data, recipe.augment, recipe.distill, recipe.optim
    research = recipe.research
    logits = distill.label_weight + distill.soft_weight + distill.hard_weight
    imitation = distill.block_weight + distill.mixer_weight + distill.relation_weight
    problems = []

    def refuse(section: Any, name: str, when: bool, why: str) -> None:
        if when:
            place = next(f.name for f in fields(recipe) if getattr(recipe, f.name) is section)
            problems.append(f"{place}.{name} is {getattr(section, name)!r}, but {why}")

    # ranges, as (lowest, highest) of what is allowed
    inf = float("inf")
    share, positive, count, any_count = (0.0, 1.0), (1e-30, inf), (1, inf), (0, inf)
    for section, ranges in (
        (
            data,
            {"img_size": count, "crop_pct": (1e-6, 1.0), "val_fraction": (1e-6, 1 - 1e-6), "num_workers": any_count},
        ),
        (augment, {"hflip": share, "color_jitter": any_count, "random_erasing": share}),
        (augment, {"mixup": any_count, "cutmix": any_count}),
        (recipe.model, {"drop_path_rate": (0.0, 1 - 1e-6)}),
        (recipe.teacher, {"epochs": count, "lr": positive}),
        (distill, {**{f"{name}_weight": any_count for name in distill.weights}, "temperature": positive}),
        (distill, {"teacher_img_size": any_count, "cache_augmentations": any_count}),
        (research, {"relation_tokens": count, "phase": (1e-6, 1.0)}),
        (research, {"cache_top_k": any_count, "fit_affine_batches": any_count}),
        (optim, {"lr": positive, "min_lr": (0, optim.lr), "weight_decay": any_count, "epochs": count}),
        (optim, {"warmup_epochs": any_count, "batch_size": count, "accumulation": count, "clip_grad": any_count}),
        (optim, {"label_smoothing": (0.0, 1 - 1e-6), "ema_decay": (0.0, 1 - 1e-6)}),
    ):
        for name, (low, high) in ranges.items():
            inside = low <= getattr(section, name) <= high
            refuse(section, name, not inside, f"must lie in {low:g} to {high:g}")

    # terms and their teachers
    if not any(distill.weights.values()):
        problems.append("every weight in distill is 0: nothing would be learned")
    elif not logits:
        problems.append("label, soft and hard weight in distill are 0: the classifier would learn nothing")
    asks = distill.soft_weight or distill.hard_weight
    teachers = distill.logit_teachers
    refuse(distill, "logit_teacher", bool(asks) and not teachers, "soft_weight or hard_weight needs one")
    refuse(distill, "logit_teacher", bool(teachers) and not asks, "soft_weight and hard_weight are 0")
    shares = research.logit_teacher_weights
    refuse(
        research,
        "logit_teacher_weights",
        bool(shares) and len(shares) != len(teachers),
        f"there are {len(teachers)} logit teachers",
    )
    refuse(research, "logit_teacher_weights", any(share <= 0 for share in shares), "shares must be positive")
    takes = imitation or distill.start_from_teacher
    refuse(distill, "module_teacher", bool(takes) and not distill.module_teacher, "imitation or the start needs one")
    refuse(distill, "module_teacher", bool(distill.module_teacher) and not takes, "nothing is taken from it")
    overwritten = bool(recipe.model.start) and distill.start_from_teacher
    refuse(recipe.model, "start", overwritten, "distill.start_from_teacher would overwrite it; set one of the two")
    fits, foreign = research.fit_affine_batches > 0, not recipe.model.name.startswith("riformer_")
    without = "affine" not in recipe.model.mixer or foreign
    refuse(research, "fit_affine_batches", fits and without, f"{recipe.model.name} has no affine here")
    why = "affines are fitted behind the teacher's norms: set distill.start_from_teacher"
    refuse(research, "fit_affine_batches", fits and not distill.start_from_teacher, why)

    # kept teacher outputs
    keeps, always = distill.cache_augmentations > 0, distill.schedule != "first_phase" or research.phase == 1
    refuse(
        distill,
        "cache_augmentations",
        keeps and augment.mixes,
        "mixup and cutmix mix an image with others of its batch: set augment.mixup and augment.cutmix to 0",
    )
    refuse(
        distill,
        "cache_augmentations",
        keeps and distill.cache_augmentations >= optim.epochs,
        f"must be below the {optim.epochs} epochs: the logit teacher would run in each of them",
    )
    refuse(
        distill,
        "cache_augmentations",
        keeps and bool(imitation) and always and set(teachers) == {distill.module_teacher},
        "has no effect: the logit teacher is the module teacher, which imitation needs in every step; let imitation "
        "end (schedule first_phase, phase below 1), or set its weights to 0",
    )

    for place, why in idle(recipe):
        section_name, name = place.split(".")
        refuse(getattr(recipe, section_name), name, True, f"has no effect: {why}")

    # what must agree
    if optim.batch_size % max(1, optim.accumulation):
        problems.append(f"optim.batch_size {optim.batch_size} does not divide by accumulation {optim.accumulation}")
    elif augment.mixes and optim.batch_size // optim.accumulation % 2:
        problems.append(f"mixup and cutmix need even batches, not {optim.batch_size // optim.accumulation}")
    refuse(optim, "warmup_epochs", optim.warmup_epochs >= optim.epochs, f"must be below the {optim.epochs} epochs")
    if problems:
        raise ValueError(f"recipe {recipe.name!r}:\n  " + "\n  ".join(problems))


def idle(recipe: Recipe) -> list[tuple[str, str]]:
    """Knobs that differ from their default and have no effect in this recipe, as (section.knob, why)."""
    augment, distill = recipe.augment, recipe.distill
    teachers, keeps = distill.logit_teachers, distill.cache_augmentations > 0
    any_teacher = teachers or distill.module_teacher
    imitation = distill.block_weight or distill.mixer_weight or distill.relation_weight
    own_sizes = recipe.model.name.startswith("riformer_")
    sizes = ("mixer", "depths", "dims", "stem_patch", "stem_stride", "down_patch", "layer_scale_init")
    timm_only = tuple(f.name for f in fields(augment) if f.name != "policy")
    rules: tuple[tuple[str, tuple[str, ...], object, str], ...] = (
        ("model", sizes, own_sizes, f"{recipe.model.name} is no riformer_*; use model.args"),
        ("teacher", ("args",), recipe.teacher.name, "teacher.name is empty"),
        ("distill", ("teacher_img_size", "compile_teachers"), any_teacher, "no teacher is named"),
        ("distill", ("cache_augmentations",), teachers, "no logit teacher is named"),
        ("research", ("cache_top_k",), keeps, "cache_augmentations is 0"),
        ("distill", ("temperature",), distill.soft_weight, "soft_weight is 0"),
        ("research", ("block_match",), distill.block_weight, "block_weight is 0"),
        ("research", ("relation_tokens",), distill.relation_weight, "relation_weight is 0"),
        ("research", ("positions",), imitation, "the imitation weights are 0"),
        ("distill", ("schedule",), imitation, "the imitation weights are 0"),
        ("research", ("phase",), imitation and distill.schedule == "first_phase", "schedule is not first_phase"),
        ("data", ("root",), recipe.data.name in WITH_ROOT, f"only {', '.join(WITH_ROOT)} have one"),
        ("augment", timm_only, augment.policy == "timm", "augment.policy is warp"),
    )
    without_effect = [(section, name, why) for section, names, effect, why in rules if not effect for name in names]
    return [(f"{s}.{name}", why) for s, name, why in without_effect if _is_changed(getattr(recipe, s), name)]


def _is_changed(section: Any, name: str) -> bool:
    return getattr(section, name) != getattr(type(section)(), name)


def drop_idle(recipe: Recipe, keep: Collection[str] = ()) -> Recipe:
    """The recipe with its idle knobs set back to their default, all but those to keep, given as section.knob."""
    for place, _ in idle(recipe):
        if place not in keep:
            name, knob = place.split(".")
            section: Any = getattr(recipe, name)
            recipe = replace(recipe, **{name: replace(section, **{knob: getattr(type(section)(), knob)})})
    return recipe
