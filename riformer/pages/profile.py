"""A profile as a picture: two stacked bars, like the paper's figure of a ViT-B's latency."""

from pathlib import Path
from typing import Any

from riformer.atomic import replace_file
from riformer.measure.profile import KINDS, Profile
from riformer.pages.style import drawing, one_line

KIND_COLORS = dict(zip(KINDS, ("#7d848d", "#e69f00", "#d55e00", "#0b5ea8", "#c4c8ce", "#4d4d4d"), strict=True))


def draw(profile: Profile, title: str, destination: Path) -> None:
    """Writes the picture, in the format of the file's suffix.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError("a picture needs matplotlib: pip install 'riformer[report]'") from error
    with drawing({"text.parse_math": False}), replace_file(destination) as beside:
        figure = _figure(profile, one_line(title))
        figure.savefig(beside, format=destination.suffix[1:], dpi=150)


def _figure(profile: Profile, title: str) -> Any:
    from matplotlib.figure import Figure

    built_up = {step.name: max(step.added_ms, 0.0) for step in profile.steps}
    in_place = {kind: max(part["latency_ms"], 0.0) for kind, part in profile.by_kind().items()}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    highest = max(sum(built_up.values()), sum(in_place.values()), profile.whole_ms.median)
    for y, parts in ((1, built_up), (0, in_place)):
        left, total = 0.0, sum(parts.values())
        for kind, ms in parts.items():
            axes.barh(
                y, ms, left=left, height=0.62, color=KIND_COLORS[kind], edgecolor="white", label=kind if not y else ""
            )
            if ms > 0.055 * highest:
                text, middle = f"{ms:.1f} ms\n{ms / total:.0%}", left + ms / 2
                axes.text(middle, y, text, ha="center", va="center", fontsize=8, color="white", linespacing=1.3)
            left += ms
    axes.axvline(profile.whole_ms.median, color="black", linewidth=1, linestyle=":")
    axes.text(profile.whole_ms.median, 1.42, "whole network, no clocks", ha="right", va="bottom", fontsize=8)
    axes.set_yticks([1, 0], ["built up", "measured\nin place"])
    axes.set(xlabel="ms for a batch", xlim=(0, 1.03 * highest), ylim=(-0.45, 1.62))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    built, placed = profile.mixer_share_built_up, profile.mixer_share_in_place
    warning = "" if profile.adds_up else f"\nthe parts do not add up: {profile.sum_of_whole:.0%} of the whole"
    mixers = f"token mixers {built:.1%} built up (without the head), {placed:.1%} in place"
    axes.set_title(f"{title}\n{mixers}{warning}", loc="left", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure
