"""The collapsed form on a GPU: the kernels of kernels.py, and PyTorch's products for wide blocks and the classifier.

This module imports triton, which comes with PyTorch for CUDA.
"""

from collections import OrderedDict
from collections.abc import Callable
from threading import RLock

import torch
import torch.nn.functional as F
from torch import Tensor

from riformer.runtime import kernels
from riformer.runtime.collapse import BlockWeights, NetworkWeights
from riformer.runtime.opaque import OpaqueNetwork

FUSED_WIDTH = 192
"""Channels up to which a block is one kernel, whose registers hold the sums of a tile in all channels."""

GRAPH_PIXELS = 8 * 224 * 224
"""Pixels of a batch up to which it is replayed from a CUDA graph, because launching kernels takes longer than they."""

MAX_GRAPHS = 8

_HOST = RLock()
"""Held while kernels are enqueued or captured, as triton's autotuner is not thread-safe."""


class TritonNetwork(OpaqueNetwork):
    """A network on one GPU; on the CPU, in triton's interpreter.

    Several threads may call it at once, on any streams. Small batches are replayed from a CUDA graph, captured when
    their shape and type first come; calls with the same shape and type wait for each other on the GPU.

    Choice: the map between two blocks is in the precision of the products, half the traffic of float32.

    Shape: images [N, C, H, W] -> logits [N, K] in float32.
    """

    backend = "triton"

    def __init__(self, weights: NetworkWeights, dtype: torch.dtype):
        super().__init__(weights, dtype, weights.head_weight.device)
        self.eps = weights.eps
        stem, *others = (conv.weight.detach() for conv in weights.convs)
        packed = [kernels.pack_reference(stem, dtype), *(weight.permute(0, 2, 3, 1).to(dtype) for weight in others)]
        self.convs = [
            conv._replace(weight=weight.contiguous(), bias=conv.bias.detach().float())
            for conv, weight in zip(weights.convs, packed, strict=True)
        ]
        self.stages = [[_in_types(block, dtype) for block in stage] for stage in weights.stages]
        self.head = (weights.head_weight.detach().float(), weights.head_bias.detach().float())
        self._graphs = GraphCache(MAX_GRAPHS)

    @torch.no_grad()
    def compute(self, images: Tensor) -> Tensor:
        if not images.numel():
            return torch.empty(len(images), self.num_outputs, dtype=torch.float32, device=self.device)
        if not images.is_cuda:
            return self.launch(images)
        with _HOST, torch.cuda.device(self.device):
            num, _, height, width = images.shape
            if num * height * width > GRAPH_PIXELS or torch.cuda.is_current_stream_capturing():
                return self.launch(images)  # a caller's own graph records the kernels themselves
            return self._graphs.graph_for(images, lambda: _Graph(self.launch, images)).replay(images)

    def launch(self, images: Tensor) -> Tensor:
        """Kernel by kernel, without a graph."""
        x = kernels.pack(images, self.dtype)
        for conv, blocks in zip(self.convs, self.stages, strict=True):
            tokens, (height, width) = kernels.conv(x, conv)
            for block in blocks:
                self._block(tokens, block, height * width)
            x = tokens.view(len(images), height, width, -1)
        return F.linear(kernels.pooled(kernels.moments(tokens, height * width), self.eps), *self.head)

    def _block(self, x: Tensor, block: BlockWeights, num_tokens: int) -> None:
        """Computes a block in place. Shape: x [N * num_tokens, C]."""
        table = kernels.coefficient_table(kernels.moments(x, num_tokens), block, self.eps)
        if x.shape[1] <= FUSED_WIDTH:
            kernels.mlp(x, table, block.fc1_weight, block.fc1_bias, block.fc2_weight, num_tokens)
        else:
            normed = kernels.affine(x, table, num_tokens)
            x.addmm_(_gelu_of_product(normed, block.fc1_weight, block.fc1_bias), block.fc2_weight.T)


def _gelu_of_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x @ weight.T + bias). In 16 bits on a GPU it is the product's epilogue: GELU's tanh formula, within 5e-4.

    In float32 PyTorch's products follow torch.set_float32_matmul_precision.
    """
    if x.is_cuda and x.dtype != torch.float32:
        return torch._addmm_activation(bias, x, weight.T, use_gelu=True)
    return F.gelu(F.linear(x, weight, bias))


def _in_types(block: BlockWeights, dtype: torch.dtype) -> BlockWeights:
    """The operands of products in `dtype`, everything else in float32; narrow blocks scaled for the kernel's GELU."""
    narrow, names = len(block.fc2_bias) <= FUSED_WIDTH, ["fc1_weight", "fc2_weight"]
    if narrow and dtype != torch.float32:
        scale, back = kernels.GELU_SCALE, 0.5 / kernels.GELU_SCALE
        fc1 = {"fc1_weight": block.fc1_weight * scale, "fc1_bias": block.fc1_bias * scale}
        block = block._replace(**fc1, fc2_weight=block.fc2_weight * back)
    if not narrow:
        names.append("fc1_bias")
    return BlockWeights(
        **{
            name: tensor.detach().to(dtype if name in names else torch.float32).contiguous()
            for name, tensor in block._asdict().items()
        }
    )


class GraphCache:
    """Graphs by the shape and type of their images; the one whose use is longest ago makes room for a new one.

    Args:
        size: number of graphs kept.
    """

    def __init__(self, size: int):
        self.size = size
        self._graphs: OrderedDict[tuple[torch.Size, torch.dtype], _Graph] = OrderedDict()

    def graph_for(self, images: Tensor, capture: Callable[[], "_Graph"]) -> "_Graph":
        """The graph for images of this shape and type, captured when they first come."""
        key = (images.shape, images.dtype)
        graph = self._graphs.pop(key, None) or capture()
        self._graphs[key] = graph
        if len(self._graphs) > self.size:
            _, oldest = self._graphs.popitem(last=False)
            oldest.wait()  # its buffers are freed with it
        return graph


class _Graph:
    """The kernels of one call, captured, with the buffers that they read and write.

    Args:
        launch: enqueues the kernels, from images to logits.
        images: like those that will come.
    """

    def __init__(self, launch: Callable[[Tensor], Tensor], images: Tensor):
        self._ended = torch.cuda.Event()
        with torch.inference_mode(False), torch.no_grad():  # buffers that later calls may write in any mode
            self.images = torch.empty_like(images, memory_format=torch.contiguous_format).copy_(images)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # tunes and compiles what the shape needs, which a capture must not
                for _ in range(2):
                    launch(self.images)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may use the GPU
                self.logits = launch(self.images)

    def replay(self, images: Tensor) -> Tensor:
        """The logits, on the current stream, after the replay before on whatever stream it was."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self._ended)
        self.images.copy_(images)
        self.graph.replay()
        logits = self.logits.clone()
        self._ended.record(stream)
        return logits

    def wait(self) -> None:
        """Returns when the last replay has ended."""
        self._ended.synchronize()
