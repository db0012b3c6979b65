"""Augmentation of whole batches of small grey images on the device that holds them, without a random generator.

Every augmented image is a pure function of the image and its key. Random numbers are hashes of the key and a counter,
so that the result depends neither on the other images of the batch nor on their order.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = -7046029254386353131  # 2^64 over the golden ratio, as a signed integer: splitmix64's step

# Choice: strengths at which people still read a glyph easily.
SCALE = (0.65, 1.1)
ASPECT = 0.12  # of the logarithm
ROTATION = 0.26  # radians
SHEAR = 0.25
BACKGROUND = (0.0, 0.4)
CONTRAST = (0.4, 1.0)
GRADIENT = 0.1
NOISE = 0.05


def warp(images: Tensor, keys: Tensor, size: int) -> Tensor:
    """Random scale, aspect, rotation, shear, shift, background, contrast, inversion, gradient and noise.

    A glyph in the middle of the image stays inside after the shift. Images with the same key get the same draws.

    Shape: images [N, H, W] of bytes, light on black; keys [N] int64 -> [N, size, size] in 0..1.
    """
    num = len(images)
    draws = iter(uniforms(keys, 14).unbind(1))

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * next(draws)

    scale, aspect = between(*map(math.log, SCALE)).exp(), between(-ASPECT, ASPECT).exp()
    angle, shear = between(-ROTATION, ROTATION), between(-SHEAR, SHEAR)
    cos, sin, wide, high = angle.cos(), angle.sin(), scale * aspect, scale / aspect
    forward = torch.stack([cos * wide, (shear * cos - sin) * high, sin * wide, (cos + shear * sin) * high], 1)
    inverse = torch.linalg.inv(forward.view(num, 2, 2))
    room = (1 - 0.75 * scale).clamp(min=0.06) + 0.04
    shift = torch.stack([between(-1, 1) * room, between(-1, 1) * room], 1)[..., None]
    grid = F.affine_grid(torch.cat([inverse, -(inverse @ shift)], 2), [num, 1, size, size], align_corners=False)
    smaller = F.interpolate(images[:, None].float() / 255, (size, size), mode="area")
    ink = F.grid_sample(smaller, grid, align_corners=False)[:, 0]

    def plane(values: Tensor) -> Tensor:
        return values[:, None, None]

    background, contrast = between(*BACKGROUND), between(*CONTRAST)
    drawn = plane(background) + plane(torch.minimum(contrast, 1 - background)) * ink
    ramp = torch.linspace(-1, 1, size, device=images.device)
    drawn = drawn + plane(between(-GRADIENT, GRADIENT)) * ramp + plane(between(-GRADIENT, GRADIENT)) * ramp[:, None]
    drawn = drawn + plane(between(0, NOISE)) * normals(keys, size * size).view(num, size, size)
    drawn = torch.where(plane(next(draws) < 0.5), 1 - drawn, drawn)
    return drawn.clamp(0, 1)


def uniforms(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """Numbers in [0, 1), splitmix64 of key and position. Shape: keys [N] int64 -> [N, count] float32."""
    position = torch.arange(count, device=keys.device) + (stream << 32) + 1
    x = _mix(_mix(keys)[:, None] + position * GOLDEN)
    return ((x >> 40) & 0xFFFFFF).float() / 2**24


def normals(keys: Tensor, count: int) -> Tensor:
    """Normally distributed numbers, by Box and Muller. Shape: keys [N] int64 -> [N, count] float32."""
    half = -(-count // 2)
    radius = (-2 * (1 - uniforms(keys, half, 1)).log()).sqrt()
    angle = 2 * math.pi * uniforms(keys, half, 2)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]


def _mix(x: Tensor) -> Tensor:
    """splitmix64's mixing. Products wrap around; >> copies the sign bit, and the masks clear the copies."""
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * -7723592293110705685
    return x ^ ((x >> 31) & (1 << 33) - 1)
