"""What exporters share: the graph that they write, and the payload that they return."""

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from riformer.export.resize import Resize
from riformer.model.fuse import deploy_form, fold, remaining_mixers
from riformer.model.metaformer import MetaFormer
from riformer.runtime.collapse import Collapsed
from riformer.runtime.manifest import manifest_of
from riformer.runtime.optimize import DTYPES
from riformer_runtime.artifact import Payload, Precision, file_sum
from riformer_runtime.engines import PayloadRunner, open_file

Inside = Literal["", "normalise", "resize"]


class OnnxFile(NamedTuple):
    """A graph in float32 in an .onnx file.

    Attributes:
        path: of the file.
        form: of the graph, see `Graph`.
        any_size: whether it takes images of any height and width.
    """

    path: Path
    form: str
    any_size: bool


@dataclass(frozen=True)
class Options:
    """What an exporter writes.

    Attributes:
        precision: of the payload.
        form: of a RIFormer's graph: "deploy", folded, or "collapsed", matrix products and coefficients. Other networks
            have the form "training".
        inside: what of the preprocessing the graph does itself, see `riformer_runtime.Payload`.
        dynamic: whether it takes any number of images, or as many as the example has.
        any_size: whether it takes images of any size, where the network does.
        unquantised: names of int8's operators that stay in float.
        source: the graph in float32, where an exporter that starts from ONNX need not write it again.
        threads: of the runner; 0 for as many as the process may use.
    """

    precision: Precision = "fp32"
    form: Literal["deploy", "collapsed"] = "deploy"
    inside: Inside = ""
    dynamic: bool = True
    any_size: bool = True
    unquantised: tuple[str, ...] = ()
    source: OnnxFile | None = None
    threads: int = 0


class Graph(nn.Module):
    """A copy of a network that takes and gives float32, whatever it computes in.

    Attributes:
        form: "deploy" or "collapsed" of a RIFormer, "training" of every other network.

    Shape: images [N, C, H, W] -> logits [N, K].

    Raises:
        ValueError: the model mixes tokens and the form is "collapsed"; or preprocessing that no graph has.
    """

    def __init__(self, model: nn.Module, options: Options):
        super().__init__()
        is_riformer = can_collapse(model)
        self.dtype = DTYPES.get(options.precision, torch.float32)
        self.form = options.form if is_riformer else "training"
        if options.form == "collapsed":
            self.network: nn.Module = Collapsed(cast(Any, model), self.dtype)
        else:
            network = fold(cast(Any, model)) if is_riformer else deepcopy(deploy_form(model))
            self.network = network.to(self.dtype).to(memory_format=torch.channels_last)
        preprocessing = manifest_of(model).preprocessing
        self.inside = options.inside
        self.resize = Resize(preprocessing) if options.inside == "resize" else nn.Identity()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(preprocessing, name))[:, None, None])
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        if self.inside:
            images = (self.resize(images) - self.mean) / self.std
        return self.network(images.to(self.dtype)).float()


def can_collapse(model: nn.Module) -> bool:
    """Whether the model is a RIFormer, whose blocks are matrix products when it is deployed."""
    return isinstance(model, MetaFormer) and not remaining_mixers(model)


def opened(
    engine: str, model: nn.Module, files: list[Path], form: str, any_size: bool, example: Tensor, options: Options
) -> PayloadRunner:
    """The files that an exporter wrote, the one that the engine opens first, on their engine."""
    batch = 0 if options.dynamic else len(example)
    payload = Payload(
        engine,
        options.precision,
        {file.name: file_sum(file) for file in files},
        form,
        options.inside,
        batch=1 if options.inside == "resize" else batch,
        any_size=any_size,
    )
    manifest = manifest_of(model)
    if not any_size:
        preprocessing = replace(manifest.preprocessing, input_size=tuple(example.shape[1:]))
        manifest = replace(manifest, preprocessing=preprocessing)
    return open_file(files[0], payload, manifest, options.threads)
