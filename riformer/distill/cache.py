"""Teacher outputs on disk: the logits for each augmentation of each image, so that a teacher sees each of them once.

The values are the teacher's own, in float32, so that a student learns exactly what it would learn from the teacher
itself; or, with `top_k`, the largest probabilities of each output, with the rest spread evenly over the other classes,
which is what the student then learns from the first epoch on. Each row has a checksum. A row that was never written or
is damaged is computed again.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from riformer.atomic import replace_folder

MANIFEST, OUTPUTS = "manifest.json", "outputs.bin"


class TeacherCache:
    """The outputs of a logit teacher, a row for each augmentation of each image, in one file that processes share.

    One process calls `create`, then all call `open`. A row may be written by one process and read by another.

    Args:
        folder: holds the file and its manifest.
        num_augmentations: rows for each image.
        num_images: images in the training split.
        num_classes: logits in each output.
        top_k: probabilities stored of each output; 0 stores all logits.

    Raises:
        ValueError: `top_k` is not below the number of classes.
    """

    def __init__(self, folder: str | Path, num_augmentations: int, num_images: int, num_classes: int, top_k: int = 0):
        if top_k >= num_classes:
            raise ValueError(
                f"research.cache_top_k is {top_k}, but must be below the {num_classes} classes; 0 keeps all logits"
            )
        self.folder = Path(folder)
        self.shape = (num_augmentations, num_images)
        self.num_classes, self.top_k = num_classes, top_k
        # with top_k: the log-probabilities of the most probable classes, then that of any other class
        fields = [("values", "<f4", (top_k + 1,)), ("classes", "<i4", (top_k,))]
        self._row = np.dtype([*(fields if top_k else [("values", "<f4", (num_classes,))]), ("checksum", "<u4")])
        self.nbytes = num_augmentations * num_images * self._row.itemsize

    def describe(self) -> str:
        """What is stored, its size and its place, for messages."""
        augmentations, images = self.shape
        what = f"{self.top_k} probabilities" if self.top_k else f"{self.num_classes:,} logits"
        plural = "s" if augmentations > 1 else ""
        size = _readable(self.nbytes)
        return f"{images:,} images x {augmentations} augmentation{plural} x {what}, {size} in {self.folder}"

    def check_space(self) -> None:
        """Checks that the disk has room for a file that was not created yet; the run folder must exist.

        Raises:
            ValueError: there is too little room.
        """
        free = shutil.disk_usage(self.folder.parent).free
        if not self.folder.exists() and free < self.nbytes:
            raise ValueError(
                f"no room for teacher outputs: {self.describe()}, where {_readable(free)} are free; lower "
                f"distill.cache_augmentations, set research.cache_top_k, or choose another --out"
            )

    def create(self, origin: dict[str, Any]) -> None:
        """Makes an empty file of full size with its manifest, or checks that an existing one has the same origin.

        Args:
            origin: what the outputs depend on, by name, as JSON types.

        Raises:
            ValueError: no room on the disk, or outputs of another origin; the message names the differences.
        """
        origin = json.loads(json.dumps({**origin, "num_classes": self.num_classes, "top_k": self.top_k}))
        origin |= dict(zip(("num_augmentations", "num_images"), self.shape, strict=True))
        if self.folder.exists():
            self._check(origin)
            return
        self.check_space()
        with replace_folder(self.folder) as beside:
            with open(beside / OUTPUTS, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a bus error in an epoch
                    os.posix_fallocate(file.fileno(), 0, self.nbytes)
                file.truncate(self.nbytes)
            (beside / MANIFEST).write_text(json.dumps(origin, indent=2), encoding="utf-8")

    def _check(self, origin: dict[str, Any]) -> None:
        try:
            before = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            size = (self.folder / OUTPUTS).stat().st_size
            if not isinstance(before, dict):
                raise ValueError(f"{MANIFEST} holds no JSON object")
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder} cannot be read ({error}); delete the folder to compute it anew") from error
        pairs = [(name, before.get(name), origin.get(name)) for name in sorted(before.keys() | origin.keys())]
        differences = [f"{name}: {old!r} there, {new!r} now" for name, old, new in pairs if old != new]
        if size != self.nbytes and not differences:
            differences = [f"size of {OUTPUTS}: {size:,} bytes there, {self.nbytes:,} now"]
        if differences:
            raise ValueError(
                f"{self.folder} holds other teacher outputs; delete the folder to compute them anew:\n  "
                + "\n  ".join(differences)
            )

    def open(self) -> None:
        """Maps the file that `create` made, in this process."""
        self._rows = np.memmap(self.folder / OUTPUTS, self._row, "r+", shape=self.shape)

    def flush(self) -> None:
        """Waits until all rows that were written are on the disk, safe from a power failure."""
        self._rows.flush()

    def logits(self, augmentation: int, indices: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The logits of these images under this augmentation. If any is missing, `compute` is called for all of them.

        Shape: indices [n], compute() [n, num_classes] on any device -> [n, num_classes] float32 on the CPU.
        """
        images = indices.numpy()
        rows = self._rows[augmentation, images]
        missing = _checksums(rows) != rows["checksum"]
        if missing.any():
            rows[missing] = self._pack(compute())[missing]
            self._rows[augmentation, images[missing]] = rows[missing]
        return self._unpack(rows)

    def _pack(self, logits: Tensor) -> np.ndarray:
        """Rows, with their checksums."""
        logits = logits.float().cpu()
        rows = np.zeros(len(logits), self._row)
        if self.top_k:
            values, classes = logits.log_softmax(1).sort(dim=1, descending=True, stable=True)
            rest = values[:, self.top_k :].logsumexp(1, keepdim=True) - log(self.num_classes - self.top_k)
            rows["values"] = torch.cat([values[:, : self.top_k], rest], dim=1).numpy()
            rows["classes"] = classes[:, : self.top_k].numpy()
        else:
            rows["values"] = logits.numpy()
        rows["checksum"] = _checksums(rows)
        return rows

    def _unpack(self, rows: np.ndarray) -> Tensor:
        values = torch.from_numpy(rows["values"].copy())
        if not self.top_k:
            return values
        logits = values[:, self.top_k :].repeat(1, self.num_classes)
        return logits.scatter_(1, torch.from_numpy(rows["classes"].astype(np.int64)), values[:, : self.top_k])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model: names and classes of its modules, names and contents of its tensors."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__name__}\n".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checksums(rows: np.ndarray) -> np.ndarray:
    """CRC-32 of each row without its last field, the checksum. It is not 0 for a row of zeros, which has 0 there."""
    contents = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)[:, :-4]
    return np.array([zlib.crc32(content) for content in contents], dtype=np.uint32)


def _readable(nbytes: int) -> str:
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= factor:
            return f"{nbytes / factor:,.1f} {unit}"
    return f"{nbytes} bytes"
