"""The collapsed form on a GPU: convolutions by PyTorch, everything between them by the kernels beside this file.

This module imports triton, which comes with PyTorch for CUDA.
"""

from collections import OrderedDict
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riformer.deploy import kernels
from riformer.deploy.collapse import BlockWeights, NetworkWeights, moments, normalised_mean

FUSED_WIDTH = 128
"""Channels up to which fc1, GELU and fc2 are one kernel: beyond, its accumulator leaves no room for two tiles."""

GRAPH_PIXELS = 8 * 224 * 224
"""Pixels of a batch up to which it is replayed from a CUDA graph: then launching costs more than computing."""

MAX_GRAPHS = 8


class TritonNetwork(nn.Module):
    """A network on one GPU; on the CPU, in triton's interpreter.

    Small batches are replayed from a CUDA graph, captured when their shape first comes; calls with the same shape then
    wait for each other. All else runs in any number of threads at once.

    Choice: the map between two blocks is in the precision of the products, half the traffic of float32.

    Shape: images [N, C, H, W] -> logits [N, K] in float32.
    """

    def __init__(self, weights: NetworkWeights, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.eps = dtype, weights.eps
        self.convs = [
            (weight.detach().to(dtype, memory_format=torch.channels_last), bias.detach().to(dtype), stride, padding)
            for weight, bias, stride, padding in weights.convs
        ]
        self.stages = [[_in_types(block, dtype) for block in stage] for stage in weights.stages]
        self.head = (weights.head_weight.detach().float(), weights.head_bias.detach().float())
        self._graphs: OrderedDict[tuple[int, ...], _Graph] = OrderedDict()
        self._lock = Lock()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        if not images.is_cuda or images.shape[0] * images.shape[2] * images.shape[3] > GRAPH_PIXELS:
            return self.launch(images)
        with self._lock:
            graph = self._graphs.pop(images.shape, None) or _Graph(self, images)
            self._graphs[images.shape] = graph
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
            return graph.replay(images)

    def launch(self, images: Tensor) -> Tensor:
        """Kernel by kernel, without a graph."""
        x = images.to(self.dtype, memory_format=torch.channels_last)
        for (weight, bias, stride, padding), blocks in zip(self.convs, self.stages, strict=True):
            x = _conv(x, weight, bias, stride, padding)
            num, channels, height, width = x.shape
            tokens = x.permute(0, 2, 3, 1).reshape(-1, channels)
            self._blocks(tokens, blocks, height * width)
            x = tokens.view(num, height, width, channels).permute(0, 3, 1, 2)
        pooled = normalised_mean(*moments(x.flatten(2).transpose(1, 2)), self.eps)
        return F.linear(pooled, *self.head)

    def _blocks(self, x: Tensor, blocks: list[BlockWeights], num_tokens: int) -> None:
        """A stage's blocks, in place. Shape: [N * num_tokens, C]."""
        if not blocks:
            return
        centre = x[::num_tokens]  # the first token of each sample
        partials = kernels.sums(x, centre, num_tokens)
        for block in blocks:
            table = kernels.coefficient_table(partials, centre, block, num_tokens, self.eps)
            if x.shape[1] <= FUSED_WIDTH:
                partials = kernels.mlp(x, table, block.fc1_weight, block.fc1_bias, block.fc2_weight, num_tokens)
            else:
                hidden = kernels.fc1(x, table, block.fc1_weight, block.fc1_bias, num_tokens)
                partials = kernels.fc2(hidden, block.fc2_weight, x, table, num_tokens)
            centre = table[:, 4]


def _in_types(block: BlockWeights, dtype: torch.dtype) -> BlockWeights:
    """Weights of products in `dtype`, everything else in float32."""
    products = {"fc1_weight": block.fc1_weight.to(dtype), "fc2_weight": block.fc2_weight.to(dtype)}
    others = {name: tensor.float() for name, tensor in block._asdict().items() if name not in products}
    return BlockWeights(**{name: tensor.detach().contiguous() for name, tensor in {**others, **products}.items()})


def _conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """A convolution. Choice: in float32 as a matrix product, because PyTorch's convolutions on a GPU then are TF32."""
    if x.dtype != torch.float32:
        return F.conv2d(x, weight, bias, stride, padding)
    kernel = weight.shape[2:]
    height, width = ((x.shape[2 + i] + 2 * padding - kernel[i]) // stride + 1 for i in range(2))
    patches = F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2)
    found = F.linear(patches, weight.flatten(1), bias)
    return found.view(len(x), height, width, -1).permute(0, 3, 1, 2)


class _Graph:
    """One captured shape, with the buffers that it reads and writes."""

    def __init__(self, network: TritonNetwork, images: Tensor):
        self.images = images.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # tunes and compiles what the shape needs, which a capture must not
            for _ in range(2):
                network.launch(self.images)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = network.launch(self.images)

    def replay(self, images: Tensor) -> Tensor:
        self.images.copy_(images)
        self.graph.replay()
        return self.logits.clone()
