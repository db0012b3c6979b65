"""Every knob of a training, as frozen dataclasses. A `Recipe` holds them all; recipes.py makes recipes.

The type of a knob says what values it allows, rules.py what goes together.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from riformer_runtime.validate import (
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    PositiveShare,
    Range,
    Share,
    ShareBelowOne,
)

WITH_ROOT = ("fashion-mnist", "cifar10", "cifar100", "glyphs")
"""Data sets that lie in a folder which `data.root` may name."""
BUILT_IN = ("digits", *WITH_ROOT)
"""Data sets that are arrays with splits of their own, and no folder of images."""

MOVABLE = ("data.name", "data.root", "data.num_workers")
"""Knobs that may change when a run is resumed, as long as the content of the data is the same."""


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they become tensors."""

    name: str = "digits"
    """data set: digits (built in), fashion-mnist, cifar10, cifar100, glyphs, or folder:PATH (PATH/train and PATH/val,
    or one flat folder of class folders that is split here); classes are in timm's natural order: 2, 10, ant, Zebra"""
    root: str = ""
    """folder where fashion-mnist, cifar10, cifar100 or glyphs lies, or is downloaded to; empty: ~/.cache/riformer, and
    before that the system's folder of fashion-mnist"""
    img_size: Count = 224
    """height and width of the network's input, pixels"""
    crop_pct: PositiveShare = 0.9
    """share of the resized image's side that the centre crop keeps in evaluation"""
    mean: tuple[Share, Share, Share] = (0.485, 0.456, 0.406)
    """mean of the red, green and blue channel, of values in 0..1"""
    std: tuple[PositiveShare, PositiveShare, PositiveShare] = (0.229, 0.224, 0.225)
    """standard deviation of the red, green and blue channel, of values in 0..1"""
    val_fraction: Annotated[float, Range(above=0, below=1)] = 0.2
    """share of each class held out for validation when a folder has no val"""
    split_seed: Annotated[int, Range(0, below=2**32)] = 0
    """decides which images are held out; not the seed of the training, so that all runs on a folder have one split"""
    on_bad: Literal["error", "skip"] = "error"
    """what to do with images that cannot be read: stop and name them, or leave them out, counted and listed"""
    num_workers: CountOrZero = 0
    """processes that decode and augment beside the training process"""


@dataclass(frozen=True)
class AugmentConfig:
    """What is drawn anew each time a training image is seen."""

    policy: Literal["timm", "warp"] = "timm"
    """timm: the other settings of augment, image by image; warp, without them: whole batches on the training device,
    for glyphs and other small grey images (random scale, rotation, shear, shift, contrast, inversion, noise)"""
    crop_scale: tuple[PositiveShare, PositiveShare] = (0.08, 1.0)
    """smallest and largest share of the image's area in a random crop"""
    hflip: Share = 0.5
    """probability of a horizontal flip; 0 where left and right have a meaning"""
    color_jitter: NotNegative = 0.4
    """strength of brightness, contrast and saturation jitter; for an empty auto_augment"""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of an augmentation policy (this one is RandAugment 9/0.5); empty for none"""
    random_erasing: Share = 0.25
    """probability that a rectangle is erased"""
    mixup: NotNegative = 0.8
    """alpha of mixup; 0 for none"""
    cutmix: NotNegative = 1.0
    """alpha of cutmix; 0 for none"""

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.policy == "timm" and bool(self.mixup or self.cutmix)


@dataclass(frozen=True)
class ModelConfig:
    """The network that is trained: a registered name, and arguments that differ from the name's own."""

    name: str = "riformer_s12"
    """model name, see `riformer list models`, or any of timm's; the settings from mixer to layer-scale-init are for
    riformer_* alone"""
    mixer: str | tuple[str, ...] = "affine"
    """token mixer, see `riformer list mixers`; several are one for each stage or for each block; affine is RIFormer's
    training form"""
    depths: tuple[Count, ...] | None = None
    """blocks in each stage; null keeps the name's own"""
    dims: tuple[Count, ...] | None = None
    """channels in each stage; null keeps the name's own"""
    stem_patch: Count | None = None
    """kernel of the first convolution, pixels; null keeps the name's own"""
    stem_stride: Count | None = None
    """stride of the first convolution, pixels; null keeps the name's own"""
    down_patch: Count | None = None
    """kernel of the convolutions between stages, tokens, their stride being 2; null keeps the name's own"""
    layer_scale_init: NotNegative | None = None
    """first value of the layer scales; null keeps the name's own"""
    drop_path_rate: ShareBelowOne = 0.0
    """stochastic depth of the last block, rising linearly from 0 at the first"""
    args: dict[str, Any] = field(default_factory=dict, hash=False)
    """further arguments of the model's constructor, as JSON"""
    start: str = ""
    """weights to start from, named like --distill.logit-teacher; a classifier for other classes starts anew"""


@dataclass(frozen=True)
class TeacherConfig:
    """The token-mixer network that a run trains for itself first, when a teacher is named "own"."""

    name: str = ""
    """its model name, any of timm's; empty for the student's own sizes with the token mixer of --teacher.mixer"""
    mixer: str = "pooling"
    """token mixer of a teacher that has the student's sizes"""
    args: dict[str, Any] = field(default_factory=dict, hash=False)
    """further arguments of a named teacher's constructor, as JSON"""
    epochs: Count = 120
    """epochs of the teacher's own training, on labels"""
    lr: Positive = 1e-3
    """peak learning rate of the teacher's own training"""


@dataclass(frozen=True)
class DistillConfig:
    """What the network learns from: weights of the terms, and the two teachers behind them."""

    logit_teacher: str | tuple[str, ...] = ""
    """whose logits are learned: "own" (trained first in the same run), a run folder, a model folder or file, timm:NAME
    for a pretrained model, timm:NAME@FILE for one with your weights, local-dir:FOLDER or hf-hub:NAME; of
    several, the mean of their probabilities; empty for none"""
    module_teacher: str = ""
    """whose blocks and mixers are imitated, and whose weights the student may start from; named like one logit
    teacher"""
    teacher_classes: str = ""
    """text file with the class names, one a line, of logit teachers that carry none, in the order of their outputs"""
    trust_teacher: bool = False
    """train even if a logit teacher does badly on the validation images, on which each is measured first"""
    teacher_img_size: CountOrZero = 0
    """pixels at which teachers see the images; 0 for each one's own size, to which images are resized"""
    compile_teachers: bool = False
    """torch.compile the teachers"""
    start_from_teacher: bool = False
    """start from the module teacher's weights, all but its mixers"""
    label_weight: NotNegative = 1.0
    """weight of the cross-entropy to the label"""
    hard_weight: NotNegative = 0.0
    """weight of the cross-entropy to the logit teacher's arg-max"""
    soft_weight: NotNegative = 0.0
    """weight of the divergence from the logit teacher's probabilities"""
    temperature: Positive = 1.0
    """softens both sides of the soft term, which is multiplied by its square"""
    block_weight: NotNegative = 0.0
    """weight of the distance between block outputs (L_in')"""
    mixer_weight: NotNegative = 0.0
    """weight of the distance between mixer outputs (L_out)"""
    relation_weight: NotNegative = 0.0
    """weight of the distance between token-by-token cosine similarities of block outputs (L_rel)"""
    schedule: Literal["constant", "cosine", "first_phase"] = "constant"
    """how the three imitation weights go over training: constant, cosine to zero, or on for the first part only"""
    cache_augmentations: CountOrZero = 0
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
    def imitates(self) -> bool:
        """Whether a term compares the student with the module teacher."""
        return bool(self.block_weight or self.mixer_weight or self.relation_weight)

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
    relation_tokens: Count = 196
    """most tokens of a map that the relation term compares; larger maps are average-pooled down to it"""
    phase: PositiveShare = 0.5
    """share of training that the first_phase schedule lasts"""
    logit_teacher_weights: tuple[Positive, ...] = ()
    """weights of several logit teachers in the mean of their probabilities; empty for equal ones"""
    cache_top_k: CountOrZero = 0
    """probabilities kept of each teacher output, the rest of its mass spread evenly over the other classes; 0 keeps all
    logits"""
    fit_affine_batches: CountOrZero = 0
    """training batches on which the affines are fitted to the module teacher's mixers by least squares before the first
    step; 0 starts them at s = 1, t = 0"""


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are updated."""

    name: str = "adamw"
    """timm's name of the optimiser"""
    lr: Positive = 4e-3
    """peak learning rate, for the whole batch"""
    weight_decay: NotNegative = 0.05
    """weight decay, on matrices and kernels only, and on the whole of imitation's projections"""
    epochs: Count = 300
    """passes over the training images"""
    warmup_epochs: NotNegative = 5.0
    """epochs of linear warm-up"""
    min_lr: NotNegative = 1e-5
    """learning rate at the end of the cosine"""
    batch_size: Count = 4096
    """images in one optimiser step, over all processes and accumulation steps together"""
    accumulation: Count = 1
    """parts that a process splits its share of the batch into, one after the other"""
    clip_grad: NotNegative = 0.0
    """largest norm of the gradient; 0 does not clip"""
    label_smoothing: ShareBelowOne = 0.1
    """probability mass that the label term spreads over all classes"""
    ema_decay: ShareBelowOne = 0.0
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
    seed: Annotated[int, Range(0, below=2**32)] = 0
    """decides initialisation, order, augmentation and every other draw"""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    research: ResearchConfig = field(default_factory=ResearchConfig)


def option(knob: str) -> str:
    """How a knob is written on the command line: --data.on-bad for data.on_bad."""
    return "--" + knob.replace("_", "-")


def value_of(recipe: Recipe, knob: str) -> Any:
    """The value of a knob, which is named like `optim.lr`."""
    value: Any = recipe
    for name in knob.split("."):
        value = getattr(value, name)
    return value


def default_of(knob: str) -> Any:
    """The value that a knob has when nothing is said."""
    return value_of(Recipe(), knob)


def with_value(recipe: Recipe, knob: str, value: Any) -> Recipe:
    """The recipe with another value of a knob."""
    section, _, name = knob.rpartition(".")
    if not section:
        return replace(recipe, **{name: value})
    return replace(recipe, **{section: replace(getattr(recipe, section), **{name: value})})
