"""Published trainings on ImageNet-1k as recipes: RIFormer's, its teachers' and its baselines'.

`--data.name` is a folder with train/ and val/, ./imagenet unless told otherwise. GFNet-H-B, the logit teacher, lies
where only a browser gets it, linked from the README of raoyongming/GFNet: put it at ./gfnet-h-b.pth or name it with
`--distill.logit-teacher timm:gfnet_h_b@FILE`. PoolFormer, the module teacher, is fetched by timm. `--nproc-per-node` is
the number of GPUs; for less memory raise `--optim.accumulation`, for fewer GPUs too.

The costs are estimates on paper, for the GPU on which the paper measured throughput, made from published inference
speeds by `gpu_hours` in riformer/measure/cost.py; `riformer train --recipe NAME --dry-run` measures your own. The
accuracies are the published ones. This project has not yet reproduced them.

RIFormer's learning rate, warm-up, gradient clipping, drop path and evaluation sizes are those of mmpretrain's configs.
Choices: drop path is 0.1 in all sizes, as there, although PoolFormer's own trainings go up to 0.4; mixup and cutmix,
which those configs lack, are PoolFormer's; the weights of the terms and their fading are as in all recipes here; the
short runs warm up for 5 epochs.
"""

from collections.abc import Callable
from dataclasses import replace

from riformer.config import AugmentConfig, DataConfig, DistillConfig, ModelConfig, OptimConfig, Recipe

# The paper's paradigm: soft labels without ground truth, the teacher's weights, imitation. Choice: equal weights of the
# terms, and imitation fading out, because the paper gives no values.
PARADIGM = DistillConfig(
    logit_teacher="timm:gfnet_h_b@gfnet-h-b.pth",
    module_teacher="timm:poolformer_s12",
    start_from_teacher=True,
    label_weight=0.0,
    soft_weight=1.0,
    block_weight=1.0,
    mixer_weight=1.0,
    relation_weight=1.0,
    schedule="cosine",
)


def _images(size: str) -> DataConfig:
    """Evaluated as in mmpretrain: resized to 248 px (M sizes: 236) and cropped to 224; at 384 px, to 426 (404)."""
    return DataConfig(name="folder:imagenet", crop_pct=0.949 if size.startswith("m") else 0.9, num_workers=8)


def _riformer(size: str) -> Recipe:
    """600 epochs at 224 px. On eight GPUs a part of the batch is 128 images, as in mmpretrain's 32 x 128."""
    return Recipe(
        name=size,
        data=_images(size),
        model=ModelConfig(name=f"riformer_{size}", drop_path_rate=0.1),
        distill=replace(PARADIGM, module_teacher=f"timm:poolformer_{size}"),
        optim=OptimConfig(lr=4e-3, epochs=600, warmup_epochs=20, batch_size=4096, accumulation=4, clip_grad=5.0),
    )


def _finetuned(size: str) -> Recipe:
    """30 more epochs at 384 px, from the run of the same size at 224.

    Choices: batch and learning rate are those of sail-sg/metaformer's fine-tunings at 384 px; imitation, which has
    faded out at the end of the first run, stays out; the logit teacher sees the images at 224 px, the size that it was
    trained for (`--distill.teacher-img-size 384` resamples it instead).
    """
    first = _riformer(size)
    return replace(
        first,
        name=f"{size}-384",
        data=replace(first.data, img_size=384),
        model=replace(first.model, start=f"runs/{size}-seed0"),
        distill=DistillConfig(logit_teacher=PARADIGM.logit_teacher, label_weight=0.0, soft_weight=1.0),
        optim=OptimConfig(lr=5e-5, epochs=30, warmup_epochs=0, batch_size=1024, accumulation=4, clip_grad=5.0),
    )


# size: published top-1 and GPU-hours on paper, at 224 px and of the fine-tuning at 384 px
RESULTS = {
    "s12": ("76.90", "409", "78.29", "31"),
    "s24": ("80.28", "580", "81.36", "49"),
    "s36": ("81.29", "752", "82.22", "67"),
    "m36": ("82.57", "979", "83.39", "91"),
    "m48": ("82.75", "1,222", "83.70", "116"),
}


def _published(size: str, img_size: int) -> Callable[[], Recipe]:
    """The training of that size as a function that says its command, cost and result like all other recipes."""

    def recipe() -> Recipe:
        return _riformer(size) if img_size == 224 else _finetuned(size)

    name, (top1, hours, top1_384, hours_384) = size.upper(), RESULTS[size]
    about = f"RIFormer-{name} on ImageNet-1k at 224 px, 600 epochs, from GFNet-H-B and PoolFormer-{name}."
    if img_size == 384:
        about = f"RIFormer-{name} at 384 px: 30 more epochs after the recipe {size}, whose run is runs/{size}-seed0."
        top1, hours = top1_384, hours_384
    recipe.__doc__ = f"""{about}

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe {recipe().name}.
    Cost: {hours} GPU-hours on paper. Expected: top-1 {top1}, published. Source: mmpretrain, configs/riformer.
    """
    return recipe


def s12_120() -> Recipe:
    """RIFormer-S12 on ImageNet-1k at 224 px, 120 epochs: the top of the paper's ladder, for its rungs.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe s12-120, with --rung NAME for a lower rung.
    Cost: 82 GPU-hours on paper. Expected: top-1 75.36, published. Source: the paper's ablations; their number of
    epochs, below 300, is our choice.
    """
    recipe = _riformer("s12")
    return replace(recipe, name="s12-120", optim=replace(recipe.optim, epochs=120, warmup_epochs=5))


def poolformer_s12() -> Recipe:
    """PoolFormer-S12 on labels, 300 epochs: the paper's module teacher and baseline.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe poolformer-s12; other sizes with
    --model.name riformer_m36 --model.drop-path-rate 0.3 --data.crop-pct 0.95 and the like.
    Cost: 77 GPU-hours on paper. Expected: top-1 77.2, published. Source: sail-sg/poolformer.
    """
    return Recipe(
        name="poolformer-s12",
        data=_images("s12"),
        model=ModelConfig(name="riformer_s12", mixer="pooling", drop_path_rate=0.1),
        optim=OptimConfig(lr=1e-3, epochs=300, warmup_epochs=5, batch_size=1024),
    )


def identityformer_s12() -> Recipe:
    """The MetaFormer-S12 without token mixer on labels, 300 epochs: what distillation has to beat.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe identityformer-s12.
    Cost: 65 GPU-hours on paper. Expected: near IdentityFormer-S12's top-1 74.6, published for blocks that differ from
    RIFormer's in norm and activation. Source: sail-sg/metaformer.
    """
    return Recipe(
        name="identityformer-s12",
        data=_images("s12"),
        model=ModelConfig(name="riformer_s12", mixer="identity", drop_path_rate=0.1),
        optim=OptimConfig(lr=4e-3, epochs=300, warmup_epochs=20, batch_size=4096, accumulation=4),
    )


def _gfnet(name: str, drop_path_rate: float) -> Recipe:
    """The defaults of GFNet's training script, which erases nothing, with its eight GPUs of 128 images."""
    return Recipe(
        name=name.replace("_", "-"),
        data=replace(_images("s12"), crop_pct=0.875),  # their script resizes the shorter side to 256 of 224 pixels
        augment=AugmentConfig(random_erasing=0.0),
        model=ModelConfig(name=name, drop_path_rate=drop_path_rate),
        optim=OptimConfig(lr=1e-3, epochs=300, warmup_epochs=5, batch_size=1024, clip_grad=1.0),
    )


def gfnet_h_ti() -> Recipe:
    """GFNet-H-Ti on labels, 300 epochs: a small logit teacher.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe gfnet-h-ti.
    Cost: 83 GPU-hours on paper. Expected: top-1 80.1, published. Source: raoyongming/GFNet.
    """
    return _gfnet("gfnet_h_ti", 0.1)


def gfnet_h_s() -> Recipe:
    """GFNet-H-S on labels, 300 epochs: a medium logit teacher.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe gfnet-h-s.
    Cost: 184 GPU-hours on paper. Expected: top-1 81.5, published. Source: raoyongming/GFNet.
    """
    return _gfnet("gfnet_h_s", 0.2)


def gfnet_h_b() -> Recipe:
    """GFNet-H-B on labels, 300 epochs: the paper's logit teacher.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe gfnet-h-b.
    Cost: 341 GPU-hours on paper. Expected: top-1 82.9, published. Source: raoyongming/GFNet.
    """
    return _gfnet("gfnet_h_b", 0.4)


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{size: _published(size, 224) for size in RESULTS},
    **{f"{size}-384": _published(size, 384) for size in RESULTS},
    "s12-120": s12_120,
    "poolformer-s12": poolformer_s12,
    "identityformer-s12": identityformer_s12,
    "gfnet-h-ti": gfnet_h_ti,
    "gfnet-h-s": gfnet_h_s,
    "gfnet-h-b": gfnet_h_b,
}
