"""Published trainings on ImageNet-1k as recipes: RIFormer's, its teachers' and its baselines'.

`--data.name` is a folder with train/ and val/, ./imagenet unless told otherwise. GFNet-H-B, the logit teacher, lies
where only a browser gets it, linked from the README of raoyongming/GFNet: put it at ./gfnet-h-b.pth or name it with
`--distill.logit-teacher timm:gfnet_h_b@FILE`. PoolFormer, the module teacher, is fetched by timm. `--nproc-per-node` is
the number of GPUs; for less memory raise `--optim.accumulation`, for fewer GPUs too.

The costs are estimates on paper, for the GPU on which the paper measured throughput, made from published inference
speeds by `gpu_hours` in riformer/measure/cost.py; `riformer train --recipe NAME --dry-run` measures your own. The
accuracies are the published ones. This project has not yet reproduced them.

Choices where the sources are silent: the weights of the terms and their fading, as in all recipes here; 20 epochs of
warm-up for the long runs, as for networks of this kind at this batch size (sail-sg/metaformer), 5 for the short ones.
"""

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
    """Evaluated as in mmpretrain: resized to 248 px, or 236 for the M sizes, before the crop of 224."""
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


def s12() -> Recipe:
    """RIFormer-S12 on ImageNet-1k at 224 px, 600 epochs, from GFNet-H-B and PoolFormer-S12.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe s12.
    Cost: 409 GPU-hours on paper. Expected: top-1 76.90, published. Source: mmpretrain, configs/riformer.
    """
    return _riformer("s12")


def s24() -> Recipe:
    """RIFormer-S24 on ImageNet-1k at 224 px, 600 epochs, from GFNet-H-B and PoolFormer-S24.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe s24.
    Cost: 580 GPU-hours on paper. Expected: top-1 80.28, published. Source: mmpretrain, configs/riformer.
    """
    return _riformer("s24")


def s36() -> Recipe:
    """RIFormer-S36 on ImageNet-1k at 224 px, 600 epochs, from GFNet-H-B and PoolFormer-S36.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe s36.
    Cost: 752 GPU-hours on paper. Expected: top-1 81.29, published. Source: mmpretrain, configs/riformer.
    """
    return _riformer("s36")


def m36() -> Recipe:
    """RIFormer-M36 on ImageNet-1k at 224 px, 600 epochs, from GFNet-H-B and PoolFormer-M36.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe m36.
    Cost: 979 GPU-hours on paper. Expected: top-1 82.57, published. Source: mmpretrain, configs/riformer.
    """
    return _riformer("m36")


def m48() -> Recipe:
    """RIFormer-M48 on ImageNet-1k at 224 px, 600 epochs, from GFNet-H-B and PoolFormer-M48.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe m48.
    Cost: 1,222 GPU-hours on paper. Expected: top-1 82.75, published. Source: mmpretrain, configs/riformer.
    """
    return _riformer("m48")


def s12_384() -> Recipe:
    """RIFormer-S12 at 384 px: 30 more epochs after the recipe s12, whose run is runs/s12-seed0.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe s12-384.
    Cost: 31 GPU-hours on paper. Expected: top-1 78.29, published. Source: mmpretrain, configs/riformer.
    """
    return _finetuned("s12")


def s24_384() -> Recipe:
    """RIFormer-S24 at 384 px: 30 more epochs after the recipe s24, whose run is runs/s24-seed0.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe s24-384.
    Cost: 49 GPU-hours on paper. Expected: top-1 81.36, published. Source: mmpretrain, configs/riformer.
    """
    return _finetuned("s24")


def s36_384() -> Recipe:
    """RIFormer-S36 at 384 px: 30 more epochs after the recipe s36, whose run is runs/s36-seed0.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe s36-384.
    Cost: 67 GPU-hours on paper. Expected: top-1 82.22, published. Source: mmpretrain, configs/riformer.
    """
    return _finetuned("s36")


def m36_384() -> Recipe:
    """RIFormer-M36 at 384 px: 30 more epochs after the recipe m36, whose run is runs/m36-seed0.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe m36-384.
    Cost: 91 GPU-hours on paper. Expected: top-1 83.39, published. Source: mmpretrain, configs/riformer.
    """
    return _finetuned("m36")


def m48_384() -> Recipe:
    """RIFormer-M48 at 384 px: 30 more epochs after the recipe m48, whose run is runs/m48-seed0.

    Command: torchrun --nproc-per-node 8 -m riformer train --recipe m48-384.
    Cost: 116 GPU-hours on paper. Expected: top-1 83.70, published. Source: mmpretrain, configs/riformer.
    """
    return _finetuned("m48")


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
    --model.name riformer_m36 --data.crop-pct 0.949 and the like.
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
