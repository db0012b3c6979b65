"""The collapsed form on a GPU, by the kernels beside this file; the classifier alone is PyTorch's.

This module imports triton, which comes with PyTorch for CUDA.
"""

from collections import OrderedDict
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riformer.runtime import kernels
from riformer.runtime.collapse import BlockWeights, NetworkWeights

FUSED_WIDTH = 192
"""Channels up to which a block is one kernel: a tile's accumulator, all channels wide, must fit the registers."""

GRAPH_PIXELS = 8 * 224 * 224
"""Pixels of a batch up to which it is replayed from a CUDA graph: then launching costs more than computing."""

MAX_GRAPHS = 8


class TritonNetwork(nn.Module):
    """A network on one GPU; on the CPU, in triton's interpreter.

    Small batches are replayed from a CUDA graph, captured when their shape first comes. Calls with the same shape share
    its buffers: each waits on the GPU until the one before has left them, whatever streams the two are on. All else
    runs in any number of threads and streams at once. The GPU is that of the images.

    Choice: the map between two blocks is in the precision of the products, half the traffic of float32.

    Shape: images [N, C, H, W] -> logits [N, K] in float32.
    """

    def __init__(self, weights: NetworkWeights, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.eps = dtype, weights.eps
        stem, *others = (conv.weight.detach() for conv in weights.convs)
        packed = [kernels.pack_reference(stem, dtype), *(weight.permute(0, 2, 3, 1).to(dtype) for weight in others)]
        self.convs = [
            conv._replace(weight=weight.contiguous(), bias=conv.bias.detach().float())
            for conv, weight in zip(weights.convs, packed, strict=True)
        ]
        self.stages = [[_in_types(block, dtype) for block in stage] for stage in weights.stages]
        self.head = (weights.head_weight.detach().float(), weights.head_bias.detach().float())
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._lock = Lock()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        if not images.is_cuda:
            return self.launch(images)
        with torch.cuda.device(images.device):  # kernels are launched on the current device
            if images.shape[0] * images.shape[2] * images.shape[3] > GRAPH_PIXELS:
                return self.launch(images)
            with self._lock:
                key = graph_key(images)
                graph = self._graphs.pop(key, None) or _Graph(self, images)
                self._graphs[key] = graph
                if len(self._graphs) > MAX_GRAPHS:
                    _, oldest = self._graphs.popitem(last=False)
                    oldest.left.synchronize()  # its buffers go with it
                return graph.replay(images)

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
        """One block, in place. Shape: [N * num_tokens, C]."""
        table = kernels.coefficient_table(kernels.moments(x, num_tokens), block, self.eps)
        if x.shape[1] <= FUSED_WIDTH:
            kernels.mlp(x, table, block.fc1_weight, block.fc1_bias, block.fc2_weight, num_tokens)
        else:
            normed = kernels.affine(x, table, num_tokens)
            x.addmm_(_gelu_of_product(normed, block.fc1_weight, block.fc1_bias), block.fc2_weight.T)


def _gelu_of_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x @ weight.T + bias); in 16 bits on a GPU in the product's epilogue, by the tanh formula, within 5e-4.

    In float32 PyTorch's products follow torch.set_float32_matmul_precision.
    """
    if x.is_cuda and x.dtype != torch.float32:
        return torch._addmm_activation(bias, x, weight.T, use_gelu=True)
    return F.gelu(F.linear(x, weight, bias))


def _in_types(block: BlockWeights, dtype: torch.dtype) -> BlockWeights:
    """What products take in `dtype`, everything else in float32; around the narrow kernel's GELU scaled as it wants."""
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


def graph_key(images: Tensor) -> tuple:
    """All of a batch that a captured graph depends on."""
    return (*images.shape, *images.stride(), images.dtype, images.device)


class _Graph:
    """One captured shape, with the buffers that it reads and writes."""

    def __init__(self, network: TritonNetwork, images: Tensor):
        self.images = images.clone(memory_format=torch.preserve_format)
        self.left = torch.cuda.Event()  # after which the buffers are free again
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # tunes and compiles what the shape needs, which a capture must not
            for _ in range(2):
                network.launch(self.images)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = network.launch(self.images)
        self.left.record()

    def replay(self, images: Tensor) -> Tensor:
        """The logits of the images, on the caller's stream."""
        torch.cuda.current_stream().wait_event(self.left)
        self.images.copy_(images)
        self.graph.replay()
        logits = self.logits.clone()
        self.left.record()
        return logits
