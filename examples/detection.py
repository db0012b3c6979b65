"""A RIFormer as the backbone of an object detector: trains on drawn rectangles, fuses, detects the same.

timm gives the maps of the backbone, torchvision the feature pyramid and the detector (FCOS). Seconds on a CPU:

    .venv/bin/python examples/detection.py

With the authors' ImageNet weights, for images of your own in the place of `draw`:

    .venv/bin/python examples/detection.py --model riformer_s12 --pretrained --image-size 224
"""

import argparse

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou

import riformer  # noqa: F401  registers the models with timm


class Pyramid(nn.Module):
    """A timm backbone and a feature pyramid on its maps, in the form that torchvision's detectors take.

    Shape: [N, 3, H, W] -> {"0": [N, out_channels, H / 4, W / 4], "1": [N, out_channels, H / 8, W / 8], ...}.
    """

    def __init__(self, backbone: nn.Module, out_channels: int):
        super().__init__()
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(backbone.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): feature_map for i, feature_map in enumerate(self.backbone(x))})


def build(model: str, image_size: int, pretrained: bool = False) -> FCOS:
    """A detector of one class on that backbone, for square images."""
    # From nothing, a few steps would not get past the small layer scales that deep networks start with.
    scales = {} if pretrained else {"layer_scale_init": 1.0}
    backbone = timm.create_model(model, pretrained=pretrained, features_only=True, **scales)
    strides = backbone.feature_info.reduction()
    anchors = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
    return FCOS(
        Pyramid(backbone, out_channels=64),
        num_classes=2,  # background and rectangle
        anchor_generator=anchors,
        min_size=image_size,
        max_size=image_size,
        image_mean=list(backbone.default_cfg["mean"]),
        image_std=list(backbone.default_cfg["std"]),
        score_thresh=0.3,
    )


def draw(count: int, size: int, generator: torch.Generator) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Dark noise with one or two bright rectangles on it, and where they are, as torchvision's detectors take them."""
    images, targets = [], []
    for _ in range(count):
        image = 0.3 * torch.rand(3, size, size, generator=generator)
        boxes = []
        for _ in range(int(torch.randint(1, 3, (), generator=generator))):
            width, height = torch.randint(size // 6, size // 2, (2,), generator=generator).tolist()
            left = int(torch.randint(size - width, (), generator=generator))
            top = int(torch.randint(size - height, (), generator=generator))
            image[:, top : top + height, left : left + width] = 0.5 + 0.5 * torch.rand(3, 1, 1, generator=generator)
            boxes.append([left, top, left + width, top + height])
        images.append(image)
        targets.append({"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.ones(len(boxes)).long()})
    return images, targets


def train(detector: FCOS, steps: int, batch_size: int, image_size: int, generator: torch.Generator) -> list[float]:
    """The loss of each step. Trains in place."""
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3, weight_decay=0.05)
    detector.train()
    history = []
    for step in range(1, steps + 1):
        losses = detector(*draw(batch_size, image_size, generator))
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        history.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {sum(history[-10:]) / 10:.3f}")
    return history


def count_hits(detections: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> int:
    """How many rectangles have a detection that overlaps them by more than half."""
    overlaps = [box_iou(t["boxes"], d["boxes"]) for d, t in zip(detections, targets, strict=True)]
    return sum(int((overlap > 0.5).any(1).sum()) for overlap in overlaps)


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="riformer_mini", help="name of a RIFormer (riformer_mini)")
    parser.add_argument("--pretrained", action="store_true", help="start from published weights, where there are any")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps (60)")
    parser.add_argument("--batch-size", type=int, default=8, help="images a step (8)")
    parser.add_argument("--image-size", type=int, default=64, help="height and width, pixels (64)")
    args = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    detector = build(args.model, args.image_size, args.pretrained)
    train(detector, args.steps, args.batch_size, args.image_size, generator)

    images, targets = draw(32, args.image_size, generator)
    deployed = reparameterize_model(detector.eval())  # a copy with each affine merged into the norm before it
    boxes = []
    for form, model in (("training form", detector), ("deploy form", deployed)):
        with torch.no_grad():
            detections = model(images)
        boxes.append(torch.cat([detection["boxes"] for detection in detections]))
        hits, total = count_hits(detections, targets), sum(len(target["boxes"]) for target in targets)
        print(f"{form}: {len(boxes[-1])} detections, {hits} of {total} rectangles found, {count(model):,} parameters")
    if len(boxes[0]):
        print(f"largest difference of a coordinate: {(boxes[0] - boxes[1]).abs().max():.0e} pixels")


if __name__ == "__main__":
    main()
