"""Models of PyTorch as runners, and runners as models: `riformer_runtime.Runner` is what predicts and serves."""

import numpy as np
import torch
from torch import Tensor, nn

from riformer.model.fuse import deploy_form
from riformer.model.preprocessing import preprocessing_of
from riformer.runtime.manifest import manifest_of
from riformer.runtime.optimize import Runtime, device_and_dtype, optimize
from riformer_runtime.engines import Runner, describe, inside_of
from riformer_runtime.native.library import is_compiled

MIN_IMAGES_TO_COMPILE = 200


class Eager:
    """A model in eager PyTorch as a `Runner`."""

    engine, detail = "eager PyTorch", ""

    def __init__(self, model: nn.Module):
        self.model = model.eval()
        self.manifest = manifest_of(model)
        self.device, self.dtype = device_and_dtype(model)
        self.precision = PRECISIONS.get(self.dtype, "fp32")

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The logits. Shape: images [N, C, H, W], float32 -> [N, K], float32."""
        return self.model(torch.from_numpy(images).to(self.device, self.dtype)).float().cpu().numpy()


PRECISIONS = {torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


class AsModule(nn.Module):
    """A runner as a model for the evaluations, with what its manifest says in timm's fields.

    Shape: images [N, C, H, W] on the CPU -> logits [N, K].

    Raises:
        ValueError: the graph resizes images itself, so that it takes none that are resized already.
    """

    def __init__(self, runner: Runner):
        super().__init__()
        manifest, inside = runner.manifest, inside_of(runner)
        if inside == "resize":
            raise ValueError(f"{describe(runner)} resizes images itself; export without --inside resize to evaluate it")
        self.runner, self.num_classes = runner, manifest.num_classes
        self.in_chans = manifest.preprocessing.input_size[0]
        fields = {name: getattr(manifest.preprocessing, name) for name in manifest.preprocessing.__dataclass_fields__}
        if inside == "normalise":
            fields |= {"mean": (0.0,) * self.in_chans, "std": (1.0,) * self.in_chans}
        self.pretrained_cfg = {
            **fields,
            "architecture": manifest.architecture,
            "label_names": list(manifest.class_names),
            "train_data": manifest.source.get("train_data"),
        }
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.runner(images.float().contiguous().numpy()))


def as_runner(model: nn.Module, engine: str = "auto", num_images: int | None = None) -> tuple[Runner, str]:
    """The model as a runner in float32, fused first, and why it is not the native network where it could be; or "".

    Choice: "auto" is the native network for a RIFormer on a CPU, and eager PyTorch for everything else. On a GPU eager
    PyTorch computes faster than images are read. The native network is not compiled for fewer than
    `MIN_IMAGES_TO_COMPILE` images, which are done sooner than the compiler.

    Args:
        model: a network of this package or of timm, or what `optimize` returns, which stays as it is.
        engine: "auto", "eager" (PyTorch as it is), or a backend of `optimize`.
        num_images: how many images there are to compute; None for many.

    Raises:
        ValueError: the engine does not take this model.
        RuntimeError: the engine cannot run here, or does not compute what the model does.
    """
    if isinstance(model, Runtime):
        return model, ""
    model = deploy_form(model)
    device, _ = device_and_dtype(model)
    if engine == "eager" or (engine == "auto" and device.type != "cpu"):
        return Eager(model), ""
    if engine == "auto" and num_images is not None and num_images < MIN_IMAGES_TO_COMPILE and not is_compiled():
        return Eager(model), (
            "for so few images the native network is not compiled, which takes half a minute once; --engine native does"
        )
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, *preprocessing_of(model).input_size, generator=generator).to(device)
    try:
        return optimize(model, example, "fp32", "native" if engine == "auto" else engine), ""
    except (ValueError, RuntimeError) as error:
        if engine != "auto":
            raise
        return Eager(model), str(error)
