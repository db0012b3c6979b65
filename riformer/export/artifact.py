"""Writes artefacts: a network for the targets asked for, each payload compared with the training form on its engine."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from riformer.atomic import replace_file, replace_folder
from riformer.export.graph import Inside, Options, can_collapse
from riformer.export.int8 import Limits, NotWorthItError, export_int8
from riformer.export.probe import make_probe
from riformer.export.targets import EXPORTERS, Target
from riformer.machine import cpu_name, environment
from riformer.model.checkpoint import WEIGHTS_SUM, checksums
from riformer.runtime.latency import Spread, images_per_s
from riformer.runtime.manifest import manifest_of
from riformer_runtime.artifact import (
    MANIFEST,
    PROBE,
    Artifact,
    Manifest,
    Payload,
    file_sum,
    manifest_behind_graph,
    read_manifest,
)
from riformer_runtime.check import check_runner, inputs_of
from riformer_runtime.engines import PayloadRunner, num_processors

BATCH_SIZE = 8  # at which speeds are measured
ROUNDS, SECONDS = 9, 0.1
DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Samples:
    """Images of the data that a network was trained on.

    Attributes:
        name: of the data, for the record.
        images: RGB images of the training split; the first ones become the probe, all of them calibrate int8.
        accuracy: top-1 of a runner on validation images, in percent; None where there are none.
    """

    name: str
    images: Iterable[Image.Image]
    accuracy: Callable[[PayloadRunner], float] | None = None


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        artifact: opened and verified.
        refused: why int8 payloads were not written, by target.
    """

    artifact: Artifact
    refused: dict[str, str] = field(default_factory=dict)


def export(
    model: nn.Module,
    path: str | Path,
    samples: Samples,
    targets: Sequence[str] = ("native", "onnx"),
    precisions: Sequence[str] = ("fp32",),
    inside: Inside = "",
    limits: Limits = DEFAULT_LIMITS,
    source: dict[str, Any] | None = None,
    status: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Writes the network as an artefact for the targets, whole or not at all.

    Each payload is opened in its own engine and compared with the training form on images of the data, in several batch
    sizes and at another image size. Of a RIFormer both forms of the graph are measured, and the faster is written.

    Args:
        model: in training form or deploy form, or a network of timm; it stays as it is.
        path: a folder, new, empty or an artefact, which is replaced; or FILE.onnx for the one target onnx.
        samples: images of its data.
        targets: names in `EXPORTERS`.
        precisions: that are wanted; targets that lack one have the others.
        inside: what of the preprocessing becomes part of the graphs, see `Payload`.
        limits: that an int8 payload has to keep; otherwise it is not written.
        source: where the network comes from, for the record.
        status: is called with a line about what is being done.

    Raises:
        ValueError: an unknown target or precision, a combination that does not exist, or `path` has something else.
        RuntimeError: a target's packages are not installed; or a payload does not compute what the network computes.
    """
    path = Path(path)
    wanted = combinations(model, targets, precisions, inside)
    lone = path.suffix == ".onnx"
    if lone and [name for name, _ in wanted] != ["onnx"]:
        raise ValueError(f"{path} can hold one payload of the target onnx; several are written to a folder")
    if not lone:
        check_replaceable(path)
    if any(precision == "int8" for _, precision in wanted) and samples.accuracy is None:
        raise ValueError("int8 needs training images to calibrate it and validation images to judge it")
    status("computing the probe")
    probe, calibration = make_probe(model, samples.images, inside)
    images = inputs_of(calibration, manifest_of(model).preprocessing, inside)
    runners: list[PayloadRunner] = []
    refused: dict[str, str] = {}
    forms: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        for name, precision in wanted:
            target, say = EXPORTERS[name], partial(_prefixed, status, f"{name} {precision}")
            options = Options(precision=precision, inside=inside)
            if can_collapse(model) and name not in forms:
                say("comparing the forms of the graph")
                forms[name] = _rates_by_form(model, target, images[:BATCH_SIZE], options)
            if can_collapse(model):
                options = replace(options, form=max(target.forms, key=lambda form: forms[name].get(form, 0.0)))
            say("writing")
            try:
                if precision == "int8":
                    assert samples.accuracy is not None
                    runner = export_int8(model, target, work, options, images, samples.accuracy, limits, say)
                else:
                    runner = _exported(model, target, images[:2], work, options, probe)
            except NotWorthItError as error:
                refused[name] = str(error)
                continue
            say("comparing with the training form")
            checked = check_runner(runner, probe)
            if checked.problem:
                raise RuntimeError(f"{name} {precision}: {checked.problem}; nothing was written")
            runner.payload = replace(runner.payload, parity=checked.parity, speed={"forms": forms.get(name, {})})
            runners.append(runner)
        if not runners:
            raise RuntimeError("; ".join(f"{name} int8: {reason}" for name, reason in refused.items()))
        status("measuring their speeds in turns")
        payloads = _with_speeds(runners, images[:BATCH_SIZE])
        np.savez_compressed(work / PROBE, **probe)
        manifest = replace(
            manifest_of(model),
            form="deploy" if can_collapse(model) else "training",
            source={"weights_sha256": _weights_sum(model), "probe_of": samples.name, **(source or {})},
            environment=environment(1),
            probe=file_sum(work / PROBE),
        )
        if lone:
            with replace_file(path) as new:
                new.write_bytes(_with_manifest(work, payloads[0], manifest))
        else:
            with replace_folder(path) as new:
                _fill(new, work, payloads, manifest)
    return Exported(Artifact(path), refused)


def _prefixed(status: Callable[[str], None], prefix: str, text: str) -> None:
    status(f"{prefix}: {text}")


def combinations(
    model: nn.Module, targets: Sequence[str], precisions: Sequence[str], inside: str = ""
) -> list[tuple[str, str]]:
    """Targets and precisions that exist, each target with the precisions that it has.

    Raises:
        ValueError: an unknown target or precision; or a target that has nothing of what is wanted.
    """
    known = dict.fromkeys(precision for target in EXPORTERS.values() for precision in target.precisions)
    for name, values, table in (("target", targets, EXPORTERS), ("precision", precisions, known)):
        if unknown := [value for value in values if value not in table]:
            raise ValueError(f"no {name} {unknown[0]!r}; known are {', '.join(table)}")
    wanted = []
    for name in dict.fromkeys(targets):
        target = EXPORTERS[name]
        if target.riformer_only and not can_collapse(model):
            raise ValueError(f"the target {name} takes RIFormers alone, and {type(model).__name__} mixes tokens")
        has = [precision for precision in dict.fromkeys(precisions) if precision in target.precisions]
        if not has:
            raise ValueError(f"the target {name} has no {', '.join(precisions)}; it has {', '.join(target.precisions)}")
        wanted += [(name, precision) for precision in has]
    if inside == "resize" and ("int8" in precisions):
        raise ValueError("int8 with --inside resize does not exist: --inside normalise does")
    return wanted


def check_replaceable(folder: Path) -> None:
    """Checks that writing to a folder deletes nothing but an artefact.

    Raises:
        ValueError: it would.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder, or FILE.onnx for the target onnx alone")
    if not folder.is_dir() or not (names := {file.name for file in folder.iterdir() if not file.name.startswith(".")}):
        return
    own = {MANIFEST, PROBE}
    if (folder / MANIFEST).is_file():
        own |= {name for payload in read_manifest(folder).payloads for name in payload.files}
    if others := sorted(names - own):
        raise ValueError(f"{folder} has other things in it ({', '.join(others[:3])}), which would be deleted")


def _exported(
    model: nn.Module, target: Target, images: np.ndarray, folder: Path, options: Options, probe: dict[str, np.ndarray]
) -> PayloadRunner:
    """The payload, of fixed size where a graph for any size is recorded that only computes the network's own size."""
    write = partial(target.export, model, torch.from_numpy(images), folder)
    if can_collapse(model) or options.inside == "resize":
        return write(options)
    try:
        runner = write(options)
        if not runner.payload.any_size or not check_runner(runner, probe).problem:
            return runner
    except RuntimeError:  # from the recording, or from the engine at another size
        pass
    return write(replace(options, any_size=False))


def _rates_by_form(model: nn.Module, target: Target, images: np.ndarray, options: Options) -> dict[str, float]:
    """Images per second of each form of the graph in floating point, in turns; none where there is one form."""
    if len(target.forms) < 2:
        return {}
    options = replace(options, precision="fp32" if options.precision == "int8" else options.precision)
    runners = {}
    with TemporaryDirectory() as folder:
        for form in target.forms:
            (subfolder := Path(folder) / form).mkdir()
            runners[form] = target.export(model, torch.from_numpy(images[:2]), subfolder, replace(options, form=form))
        return {form: spread.median for form, spread in _measured(runners, images).items()}


def _measured(runners: Mapping[str, PayloadRunner], images: np.ndarray) -> dict[str, Spread]:
    """Images per second. Shape: images [N, C, H, W]."""
    return {name: Spread.of(rates) for name, rates in images_per_s(runners, images, ROUNDS, SECONDS).items()}


def _with_speeds(runners: Sequence[PayloadRunner], images: np.ndarray) -> list[Payload]:
    """The payloads, each with its images per second beside the others."""
    spreads = _measured({str(runner.payload): runner for runner in runners}, images)
    settings = {"batch_size": len(images), "num_threads": num_processors(), "device": cpu_name()}
    payloads = []
    for runner in runners:
        spread = spreads[str(runner.payload)]
        rates = {"images_per_s": spread.median, "low": spread.low, "high": spread.high}
        payloads.append(replace(runner.payload, speed={**rates, **settings, **runner.payload.speed}))
    return payloads


def _weights_sum(model: nn.Module) -> str:
    """SHA-256 of the weights, as in the metadata of the files that `riformer.save` writes."""
    return checksums(model.state_dict(), "")[WEIGHTS_SUM]


def _fill(folder: Path, work: Path, payloads: Sequence[Payload], manifest: Manifest) -> None:
    """Writes the artefact's files. Each .onnx file carries the manifest too, so that it can be used alone."""
    written = []
    for payload in payloads:
        if payload.engine == "onnxruntime":
            file = folder / payload.main_file
            file.write_bytes(_with_manifest(work, payload, manifest))
            payload = replace(payload, files={file.name: file_sum(file)})
        else:
            for name in payload.files:
                shutil.copy2(work / name, folder / name)
        written.append(payload)
    shutil.copy2(work / PROBE, folder / PROBE)
    (folder / MANIFEST).write_text(replace(manifest, payloads=tuple(written)).to_json(), encoding="utf-8")


def _with_manifest(work: Path, payload: Payload, manifest: Manifest) -> bytes:
    """The content of the payload's .onnx file with the manifest behind the graph."""
    return manifest_behind_graph((work / payload.main_file).read_bytes(), replace(manifest, payloads=(payload,)))
