"""One self-contained HTML page from the result files of `riformer bench`; its wording is in templates/speed.html.

Speeds are read from the files and nothing else; accuracies are quoted from papers, and marked so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from riformer.measure.quoted import QUOTED
from riformer.pages.style import ACCENT, GREY, PALETTE, drawing, one_line, svg, templates, write_page

QUOTED_PX = 224
MARKERS = {"fp32": "s", "bf16x3": "^", "bf16": "o", "fp16": "D", "int8": "v"}
FAMILY_COLORS = dict(zip(("PoolFormer", "GFNet", "DeiT", "ResNet", "ConvNeXt"), PALETTE, strict=False))


@dataclass(frozen=True)
class Bench:
    """One result file: competitors, measured in groups of image size, batch size and threads."""

    path: Path
    groups: list[dict[str, Any]]

    @property
    def models(self) -> list[str]:
        """Names of the networks, in the order of the rows."""
        return list(dict.fromkeys(row["model"] for group in self.groups for row in group["rows"]))

    @property
    def title(self) -> str:
        """The name of the network, or the number of networks."""
        return network_name(self.models[0]) if len(self.models) == 1 else f"{len(self.models)} networks"

    @property
    def device(self) -> str:
        """The device of the measurement."""
        return str(self.groups[0]["env"]["device"])

    def label(self, row: dict[str, Any], most: int = 0) -> str:
        """A row's engine and precision, and its network where there are several, shortened to `most` characters."""
        engine = f"{row['backend']} {row['precision']}"
        return engine if len(self.models) == 1 else f"{one_line(network_name(row['model']), most)}, {engine}"


def network_name(model: str) -> str:
    """The published name of a network, or the name under which it was measured."""
    return QUOTED[model].name if model in QUOTED else model


def write_speed_report(files: Sequence[Path], destination: Path) -> Path:
    """Writes one HTML file about the given bench results; returns its path.

    Raises:
        ValueError: a file is not the result of a bench, or has no finished group.
        RuntimeError: matplotlib or jinja2 is not installed.
    """
    pages = templates()
    pages.filters.update(sig=_significant, name=network_name)
    benches = [read_bench(file) for file in files]
    with drawing():
        parts = [
            dict(
                bench=bench,
                rates=_rates(bench, f"rates{i}"),
                accuracy=_accuracy(bench, f"accuracy{i}"),
                best=best(bench),
            )
            for i, bench in enumerate(benches)
        ]
    numbers = dict(parts=parts, quoted=QUOTED, where=where, quoted_px=QUOTED_PX)
    return write_page(pages, "speed.html", destination, **numbers)


def read_bench(file: Path) -> Bench:
    """A result file of `riformer bench`.

    Raises:
        ValueError: it is none, or has no finished group.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        groups = content["groups"] if content["kind"] == "bench" else None
    except (ValueError, KeyError, TypeError):
        groups = None
    if groups is None:
        raise ValueError(f"{file} is no result of `riformer bench --out`")
    if not groups:
        raise ValueError(f"{file} has no finished group yet: `riformer bench` with the same --out continues it")
    return Bench(Path(file), groups)


def where(group: dict[str, Any]) -> str:
    """Batch size, image size and threads of a group."""
    threads = group["num_threads"]
    return f"batch {group['batch_size']}, {group['img_size']} px, {threads} thread{'s' * (threads != 1)}"


class Best(NamedTuple):
    """The fastest row of a network in the group with its largest lead, and the network's first row there."""

    group: dict[str, Any]
    fastest: dict[str, Any]
    first: dict[str, Any]
    ratio: float


def best(bench: Bench) -> Best:
    """The largest lead of a network's fastest row over its first one, for the first network that runs on "ours"."""
    rows = bench.groups[0]["rows"]
    model = next((row["model"] for row in rows if row["backend"] == "ours"), rows[0]["model"])
    leads = []
    for group in bench.groups:
        rows = [row for row in group["rows"] if row["model"] == model]
        fastest = max(rows, key=lambda row: row["images_per_s"]["median"])
        ratio = median(a / b for a, b in zip(fastest["rates"], rows[0]["rates"], strict=True))
        leads.append(Best(group, fastest, rows[0], ratio))
    return max(leads, key=lambda lead: lead.ratio)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, from the largest first coordinate down."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _significant(value: float) -> str:
    """Three significant digits, with separators."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _rates(bench: Bench, name: str) -> str:
    """Images/s of every row, a panel for each group, with the limit from the device's peak."""
    from matplotlib.figure import Figure

    columns = min(3, len(bench.groups))
    lines = -(-len(bench.groups) // columns)
    labels = [bench.label(row, most=60) for row in bench.groups[0]["rows"]]
    figure = Figure(figsize=(11, lines * (0.6 + 0.21 * len(labels))), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axes in panels[len(bench.groups) :]:
        axes.axis("off")
    for axes, group in zip(panels, bench.groups, strict=False):
        rows = group["rows"]
        rates = [row["images_per_s"]["median"] for row in rows]
        errors = [
            [abs(row["images_per_s"][end] - rate) for row, rate in zip(rows, rates, strict=True)]
            for end in ("low", "high")
        ]
        colors = [ACCENT if row["backend"] == "ours" else "#b4b9c0" for row in rows]
        axes.barh(
            range(len(rows)), rates, xerr=errors, color=colors, height=0.72, error_kw=dict(lw=0.8, ecolor="#4a5058")
        )
        for y, row in enumerate(rows):
            if row.get("of_peak"):
                axes.plot(
                    [row["images_per_s"]["median"] / row["of_peak"]] * 2, [y - 0.36, y + 0.36], color="#d55e00", lw=1.4
                )
            axes.text(
                row["images_per_s"]["high"],
                y,
                f"  {_significant(rates[y])}",
                va="center",
                fontsize=7.5,
                color="#4a5058",
            )
        axes.set_title(where(group))
        axes.set_yticks(range(len(rows)), labels)
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
    panels[0].invert_yaxis()
    figure.supxlabel("images/s; orange: as many multiply-accumulates at the device's peak", fontsize=9, color="#4a5058")
    return svg(figure, name)


def _accuracy(bench: Bench, name: str) -> str:
    """Quoted top-1 over measured images/s of each group at 224 px, with the Pareto line; empty for one network."""
    from matplotlib.figure import Figure

    groups = [group for group in bench.groups if group["img_size"] == QUOTED_PX]
    if not groups or len({row["model"] for row in groups[0]["rows"]} & QUOTED.keys()) < 2:
        return ""
    figure = Figure(figsize=(11, 5.2 * len(groups)), layout="constrained")
    for axes, group in zip(figure.subplots(len(groups), 1, squeeze=False).ravel(), groups, strict=True):
        rows = [row for row in group["rows"] if row["model"] in QUOTED]
        points = [(row["images_per_s"]["median"], QUOTED[row["model"]].top1) for row in rows]
        front = pareto(points)
        steps = [(x, front[max(i - 1, 0)][1] if i else y) for i, (x, y) in enumerate(front)]
        axes.plot(
            *zip(*[p for pair in zip(steps, front, strict=True) for p in pair], strict=True),
            color="#c4c8ce",
            lw=5,
            zorder=1,
            solid_joinstyle="round",
            label="Pareto line",
        )
        series: dict[tuple[str, str, str], list[tuple[float, float, str]]] = {}
        for row, point in zip(rows, points, strict=True):
            entry = QUOTED[row["model"]]
            series.setdefault((entry.family, row["backend"], row["precision"]), []).append((*point, entry.name))
        for (family, backend, precision), entries in series.items():
            color = FAMILY_COLORS.get(family, GREY)
            if family == "RIFormer":
                color = ACCENT if backend == "ours" else "#7fb2dd"
            xs, ys, names = zip(*sorted(entries), strict=True)
            axes.plot(
                xs,
                ys,
                marker=MARKERS.get(precision, "o"),
                color=color,
                lw=1.2,
                ms=6,
                zorder=2,
                label=f"{family}, {backend} {precision}",
            )
            for x, y, text in zip(xs, ys, names, strict=True):
                axes.annotate(text, (x, y), (5, 5), textcoords="offset points", fontsize=7.5, color="#4a5058")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter("{x:,g}")
        axes.tick_params(axis="x", which="both", labelsize=8)
        axes.margins(x=0.09, y=0.09)
        axes.set(
            xlabel=f"images/s, measured: {where(group)}, {one_line(bench.device)}",
            title="top-1 on ImageNet-1k, %, quoted",
        )
        axes.legend(loc="lower left")
    return svg(figure, name)
