"""What a number was measured with: date, versions and machine."""

import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from riformer_runtime.version import __version__


def environment(world_size: int) -> dict[str, Any]:
    """Date, versions and machine, for the record."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "riformer": __version__,
        "python": sys.version.split()[0],
        **{name: version(name) for name in ("torch", "torchvision", "timm")},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "num_threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
