"""Whether an artefact's payloads compute what the network computed in training form, in their own engines."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from riformer_runtime.artifact import Artifact, Payload
from riformer_runtime.engines import PayloadRunner, describe, engine, open_payload
from riformer_runtime.preprocess import Preprocessing

TOLERANCE = {"fp32": 1e-4, "bf16x3": 5e-4, "bf16": 0.1, "fp16": 0.1, "int8": 0.5}
"""Largest difference from the training form that is accepted, relative to the largest logit, by what is computed in.
An int8 payload is judged by its accuracy when it is exported; what stands here only catches a broken one."""

BATCHES = (1, 2, 7, 64)
"""Numbers of images at once that are compared."""


@dataclass(frozen=True)
class Check:
    """What was found of a payload.

    Attributes:
        payload: that was checked.
        engine: that ran it, its precision and detail; "" where it cannot run here.
        parity: `max_abs` and `max_rel`, the largest difference of logits, absolute and relative to the largest logit;
            `top1_agreement`, the share of images with the same class; `num_images`.
        problem: why it is not accepted; "" where it is.
        skipped: why it was not run; "" where it was.
    """

    payload: Payload
    engine: str = ""
    parity: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    skipped: str = ""


def check(artifact: Artifact, trusted: bool = False) -> Iterator[Check]:
    """Runs every payload on the probe images.

    Those of engines that are not installed are skipped, and so are, unless the artefact is trusted, those whose files
    can run code.
    """
    probe = artifact.probe()
    for payload in artifact.payloads:
        try:
            runs_code = engine(payload.engine).runs_code
        except RuntimeError as error:
            yield Check(payload, skipped=str(error))
            continue
        if runs_code and not trusted:
            yield Check(payload, skipped="its files can run code; --trusted runs it")
            continue
        try:
            yield check_runner(open_payload(artifact, payload), probe)
        except (RuntimeError, ValueError) as error:
            yield Check(payload, problem=str(error))


def check_runner(runner: PayloadRunner, probe: dict[str, np.ndarray]) -> Check:
    """Compares a payload with the probe: in batches of 1, 2, 7 and 64, and at another image size where it may vary.

    Raises:
        ValueError: the probe is not of this network, or has no images.
    """
    payload = runner.payload
    if not len(probe.get("logits", ())):
        return Check(payload, describe(runner), skipped="no probe images: its checksum alone was verified")
    if payload.inside == "resize":
        originals = [probe[name][None] for name in sorted(probe) if name.startswith("original_")]
        found = [_compare(runner, image, probe["logits"][i : i + 1], 1) for i, image in enumerate(originals)]
    else:
        found = [_compare(runner, probe["pixels"], probe["logits"], size) for size in BATCHES]
        if payload.any_size and "odd_pixels" in probe:
            found += [_compare(runner, probe["odd_pixels"], probe["odd_logits"], size) for size in (1, 7)]
    parity = {
        "max_abs": max(one["max_abs"] for one in found),
        "max_rel": max(one["max_rel"] for one in found),
        "top1_agreement": min(one["top1_agreement"] for one in found),
        "num_images": len(probe["logits"]),
    }
    tolerance = TOLERANCE[payload.precision]
    far = not parity["max_rel"] <= tolerance  # also where it is not a number
    problem = f"{parity['max_rel']:.2g} of the largest logit away from the training form; {tolerance:g} is allowed"
    return Check(payload, describe(runner), parity, problem if far else "")


def inputs_of(pixels: np.ndarray, preprocessing: Preprocessing, inside: str) -> np.ndarray:
    """What a graph takes for images in 8 bits. Shape: [N, H, W, C] -> [N, C, H, W], float32."""
    values = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)
    return values if inside else preprocessing.normalise(values)


def _compare(runner: PayloadRunner, pixels: np.ndarray, expected: np.ndarray, batch_size: int) -> dict[str, float]:
    """Differences of the logits of images in 8 bits, computed `batch_size` at once. Shape: pixels [N, H, W, C]."""
    repeats = -(-batch_size // len(pixels)) if batch_size > len(pixels) else 1
    pixels, expected = np.tile(pixels, (repeats, 1, 1, 1)), np.tile(expected, (repeats, 1))
    images = inputs_of(pixels, runner.manifest.preprocessing, runner.payload.inside)
    actual = np.concatenate([runner(images[i : i + batch_size]) for i in range(0, len(images), batch_size)])
    if actual.shape != expected.shape:
        raise ValueError(f"logits are {list(actual.shape)}, but {list(expected.shape)} in the probe")
    difference, largest = np.abs(actual.astype(np.float64) - expected).max(), np.abs(expected).max()
    return {
        "max_abs": float(difference),
        "max_rel": float(difference / largest) if largest else 0.0,
        "top1_agreement": float((actual.argmax(1) == expected.argmax(1)).mean()),
    }
