"""One self-contained HTML page about a ladder, from its run folders; its wording is in templates/ladder.html.

Tables and differences come from what the runs recorded, pictures of features and speed from their saved models.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from riformer.data.batches import eval_batches, preprocessing
from riformer.data.dataset import open_dataset
from riformer.distill.families import block_names
from riformer.distill.taps import tap
from riformer.measure.quoted import LADDER
from riformer.model.fuse import deploy_form
from riformer.model.weights import load
from riformer.pages.style import GREY, PALETTE, drawing, one_line, svg, templates, write_page
from riformer.recipes import RUNGS
from riformer.runtime.latency import Spread, images_per_s
from riformer.study.comparison import Comparison, Record, is_finished, mean, record
from riformer.train.run import Run

RUNG_COLORS = ("#0b5ea8", *PALETTE, "#8c510a", "#762a83", "#1b7837", "#b2182b", "#5e4fa2", "#66c2a5")
BUDGET_COLORS, BUDGET_MARKERS = RUNG_COLORS, "os^D"
IN_PICTURES = (
    *("mixer", "identity", "deleted", "affine", "imitation", "full"),
    *("mixer-first", "mixer-last", "overlap", "deeper"),
)
NUM_IMAGES = 64


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, at any depth; a run's own teacher belongs to it.

    Raises:
        ValueError: a folder holds none.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        inside = [path.parent for path in sorted(folder.rglob("recipe.json")) if path.parent.name != "teacher"]
        if not inside:
            raise ValueError(f"no run in {folder}: `riformer ladder` writes a folder for each run into one folder")
        runs |= {path.resolve(): Run(path) for path in inside}
    return list(runs.values())


def write_ladder_report(folders: Sequence[Path], destination: Path) -> Path:
    """Writes one HTML file about the ladder whose runs lie in these folders; returns its path.

    Raises:
        ValueError: no run there, none finished, or runs on different images.
        RuntimeError: matplotlib or jinja2 is not installed.
    """
    pages = templates()
    runs = find_runs(folders)
    comparison = Comparison(record(run) for run in runs if is_finished(run))
    models, images = _models(comparison, runs)
    rates = _rates(models, images)
    with drawing():
        figures = {
            "steps": _accuracy_over_steps(comparison),
            "curves": _curves(comparison),
            "forest": svg(forest(comparison), "forest"),
            "latency": _accuracy_over_latency(comparison, rates),
            "features": _features(models, images),
            "fields": _receptive_fields(models, images),
        }
    numbers = dict(runs=runs, rungs=RUNGS, published=LADDER, mean=mean, size=int(images.shape[-1]))
    return write_page(pages, "ladder.html", destination, comparison=comparison, **numbers, **figures)


def _models(comparison: Comparison, runs: Sequence[Run]) -> tuple[dict[str, nn.Module], Tensor]:
    """The lowest seed's model of each rung, and some images.

    Models are taken from the ladder that has most of the rungs, of several the one with the largest budget. A rung that
    was not run there is taken from its own largest budget.
    """
    wanted = [rung for rung in IN_PICTURES if rung in comparison.rungs]
    ladder = max(
        comparison.ladders,
        key=lambda name: (sum(bool(comparison.top1(name, r)) for r in wanted), comparison.steps[name]),
    )
    by_name = {run.path.name: run for run in runs}
    chosen: dict[str, Record] = {}
    for entry in sorted(comparison.records, key=lambda r: (r["ladder"] != ladder, -comparison.steps[r["ladder"]])):
        chosen.setdefault(entry["rung"], entry)
    models = {rung: load(by_name[chosen[rung]["run"]].best()) for rung in wanted if rung in chosen}
    run = by_name[comparison.records[0]["run"]]
    recipe = run.recipe()
    data = open_dataset(recipe.data, run.read("data.json"))
    every = max(1, comparison.num_images // NUM_IMAGES)  # spread over the split, so that all classes are among them
    batches = eval_batches(data.splits[comparison.split], preprocessing(recipe.data), every)
    return models, torch.cat([images[:1] for images, _ in batches])[:NUM_IMAGES]


def _rates(models: dict[str, nn.Module], images: Tensor) -> dict[str, list[float]]:
    """Images per second in deploy form by round; rungs whose deploy form is the same network are measured once."""
    forms = {rung: deploy_form(model) for rung, model in models.items()}
    same = {rung: next(other for other in forms if str(forms[other]) == str(forms[rung])) for rung in forms}
    measured = images_per_s({rung: forms[rung] for rung in dict.fromkeys(same.values())}, images)
    return {rung: measured[other] for rung, other in same.items()}


def _color(comparison: Comparison, rung: str) -> str:
    return RUNG_COLORS[comparison.rungs.index(rung) % len(RUNG_COLORS)]


def _accuracy_over_steps(comparison: Comparison) -> str:
    """Top-1 over training steps, a line for each rung that was run at two budgets or more; empty with one budget."""
    from matplotlib.figure import Figure

    if len(comparison.ladders) == 1:
        return ""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots()
    for rung in comparison.rungs:
        points = [(comparison.steps[name], list(comparison.top1(name, rung).values())) for name in comparison.ladders]
        points = [(steps, values) for steps, values in points if values and rung != "labels-long"]
        color = _color(comparison, rung)
        for steps, values in points:
            axes.plot([steps] * len(values), values, ".", color=color, alpha=0.5, markersize=5)
        if len(points) > 1:
            means = [sum(values) / len(values) for _, values in points]
            axes.plot([steps for steps, _ in points], means, "o-", color=color, label=rung)
    axes.set_xscale("log")
    ticks = list(comparison.steps.values())
    axes.set_xticks(ticks, [f"{value:,}" for value in ticks])
    axes.minorticks_off()
    axes.set(xlabel="training steps", title=f"top-1 on {comparison.split}, %: a dot a seed, lines through the means")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return svg(figure, "steps")


def _curves(comparison: Comparison) -> str:
    """Validation accuracy by epoch at the largest budget that several rungs have."""
    from matplotlib.figure import Figure

    ladder = max(comparison.ladders, key=lambda name: (min(3, _num_rungs(comparison, name)), comparison.steps[name]))
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    labelled = set()
    for entry in comparison.records:
        rung, values = entry["rung"], entry["val_top1"]
        if entry["ladder"] == ladder and rung != "labels-long":
            label = rung if rung not in labelled else None
            labelled.add(rung)
            axes.plot(range(1, len(values) + 1), values, "o-", lw=1.3, color=_color(comparison, rung), label=label)
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="epoch", title=f"validation top-1, %, of {one_line(ladder, most=60)}, each seed")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return svg(figure, "curves")


def _num_rungs(comparison: Comparison, ladder: str) -> int:
    return len({entry["rung"] for entry in comparison.records if entry["ladder"] == ladder})


def forest(comparison: Comparison) -> Any:
    """Paired differences between rungs with their 95 % intervals, a color for each budget, as a matplotlib figure."""
    from matplotlib.figure import Figure

    rows = comparison.differences()
    figure = Figure(figsize=(11, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#4a5058", lw=1)
    lowest, highest = 0.0, 0.0
    for y, (_, _, differences) in enumerate(rows):
        for i, difference in enumerate(differences):
            if difference is None:
                continue
            mean, half = difference.mean, difference.half
            place = y + (i - (len(differences) - 1) / 2) * 0.24
            color = BUDGET_COLORS[i % len(BUDGET_COLORS)] if difference.is_clear else GREY
            axes.plot([mean], [place], BUDGET_MARKERS[i % 4], color=color, markersize=5)
            if half is not None:
                axes.plot([mean - half, mean + half], [place, place], color=color, lw=1.6)
            lowest, highest = min(lowest, *difference.by_seed.values()), max(highest, *difference.by_seed.values())
    for i, name in enumerate(comparison.ladders):
        color = BUDGET_COLORS[i % len(BUDGET_COLORS)]
        axes.plot([], [], BUDGET_MARKERS[i % 4], color=color, label=f"{comparison.steps[name]:,} steps")
    margin = 0.25 * (highest - lowest) or 1.0  # an interval of two seeds may be far wider than the picture
    axes.set_xlim(lowest - margin, highest + margin)
    axes.set_yticks(range(len(rows)), [f"{first} → {second}" for first, second, _ in rows])
    axes.invert_yaxis()
    axes.set(
        xlabel="points of top-1",
        title="the second rung minus the first, paired by seed, 95 % interval; grey: it contains 0",
    )
    axes.legend(loc="lower right")
    return figure


def _accuracy_over_latency(comparison: Comparison, rates: dict[str, list[float]]) -> str:
    """Top-1 at each budget over the measured time of an image, relative to the network without mixers."""
    from matplotlib.figure import Figure

    first = "deleted" if "deleted" in rates else next(iter(rates))
    base = rates[first]
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    for rung, values in rates.items():
        time = Spread.of([b / a for a, b in zip(values, base, strict=True)])
        for i, name in enumerate(comparison.ladders):
            if not (by_seed := comparison.top1(name, rung)):
                continue
            top1 = sum(by_seed.values()) / len(by_seed)
            color = _color(comparison, rung)
            axes.errorbar(
                [time.median], [top1], xerr=[[time.median - time.low], [time.high - time.median]],
                fmt=BUDGET_MARKERS[i % 4], color=color, markersize=6, lw=1,
            )  # fmt: skip
            label = f"{rung}, {comparison.steps[name]:,}"
            axes.annotate(label, (time.median, top1), (6, 4), textcoords="offset points", color=color, fontsize=8)
    axes.margins(0.12)
    title = f"top-1 on {comparison.split}, %, over the time of an image in deploy form; {first} is 1, with quartiles"
    axes.set(xlabel="time, relative", title=title)
    return svg(figure, "latency")


def _features(models: dict[str, nn.Module], images: Tensor) -> str:
    """Distributions of the outputs of the first and the last stage: the paper's figure."""
    from matplotlib.figure import Figure

    shown = [rung for rung in ("affine", "imitation", "full", "mixer") if rung in models]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, stage in zip(figure.subplots(1, 2), (0, -1), strict=True):
        for rung in shown or list(models)[:4]:
            name = block_names(models[rung])[stage][-1]
            with torch.inference_mode(), tap(models[rung], [name]) as outputs:
                models[rung](images)
            values = outputs[name].flatten()
            limit = float(values.abs().quantile(0.999)) if values.numel() < 2**24 else float(values.abs().max())
            counts = torch.histc(values, 80, -limit, limit)
            centres = (torch.arange(80) + 0.5) / 40 * limit - limit
            axes.plot(centres.tolist(), (counts / counts.sum() / (limit / 40)).tolist(), lw=1.5, label=rung)
        axes.set(title=f"after the {'first' if stage == 0 else 'last'} stage", yscale="log", xlabel="value")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.legend()
    return svg(figure, "features")


def _receptive_fields(models: dict[str, nn.Module], images: Tensor) -> str:
    """The receptive field of the middle token of the last stage, for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.4), layout="constrained")
    for axes, (rung, model) in zip(figure.subplots(1, max(2, len(models))), models.items(), strict=False):
        field = receptive_field(model, images)
        axes.imshow((field / field.max()).sqrt().tolist(), cmap="magma", vmin=0, vmax=1)
        axes.set(title=f"{rung}\n{float((field > 0).float().mean()):.0%} of the image", xticks=[], yticks=[])
        axes.grid(visible=False)
    return svg(figure, "fields")


def receptive_field(model: nn.Module, images: Tensor) -> Tensor:
    """Mean absolute gradient of the middle token after the last block, over images and channels.

    Through the statistics of a norm over the whole map every pixel changes every token a little. They are held fixed,
    so that only what carries content from place to place counts.

    Shape: images [N, 3, H, W] -> [H, W].
    """
    statistics: dict[str, tuple[Tensor, Tensor]] = {}
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}

    def record_statistics(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0].detach()
            statistics[name] = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, correction=0)

        return hook

    def hold_statistics(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.GroupNorm, args: tuple[Tensor], output: Tensor) -> Tensor:
            centre, variance = statistics[name]
            normal = (args[0] - centre) / (variance + module.eps).sqrt()
            return normal * module.weight.view(-1, 1, 1) + module.bias.view(-1, 1, 1)

        return hook

    handles: list[Any] = [module.register_forward_pre_hook(record_statistics(name)) for name, module in norms.items()]
    handles += [module.register_forward_hook(hold_statistics(name)) for name, module in norms.items()]
    name = block_names(model)[-1][-1]
    try:
        pixels = images.clone().requires_grad_()
        with torch.enable_grad(), tap(model, [name]) as outputs:
            model(pixels)
            token = outputs[name][:, :, outputs[name].shape[2] // 2, outputs[name].shape[3] // 2]
            (gradient,) = torch.autograd.grad(token.abs().sum(), pixels)
    finally:
        for handle in handles:
            handle.remove()
    return gradient.abs().mean((0, 1)).detach()
