"""One self-contained HTML page about a ladder, from its run folders; its wording is in ladder.html.

Tables and differences come from what the runs recorded, pictures of features and speed from the models that they keep.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from riformer.atomic import write_text
from riformer.data.batches import eval_batches, preprocessing
from riformer.data.dataset import open_dataset
from riformer.distill.families import block_names
from riformer.distill.taps import tap
from riformer.measure.latency import Spread, images_per_s
from riformer.measure.quoted import LADDER
from riformer.model.fuse import deploy_form
from riformer.model.weights import load
from riformer.pages.style import GREY, PALETTE, drawing, environment, svg
from riformer.recipes import RUNGS
from riformer.study.comparison import Comparison, Record, is_finished, mean, record
from riformer.train.run import Run

COLORS = ("#0b5ea8", *PALETTE, "#8c510a", "#762a83", "#1b7837", "#b2182b", "#5e4fa2", "#66c2a5")
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
    found: dict[Path, Run] = {}
    for folder in folders:
        inside = [path.parent for path in sorted(folder.rglob("recipe.json")) if path.parent.name != "teacher"]
        if not inside:
            raise ValueError(f"no run in {folder}: `riformer ladder` writes a folder for each run into one folder")
        found |= {path.resolve(): Run(path) for path in inside}
    return list(found.values())


def write_ladder_report(folders: Sequence[Path], destination: Path) -> Path:
    """Writes one HTML file about the ladder whose runs lie in these folders; returns its path.

    Raises:
        ValueError: no run there, none finished, or runs on different images.
        RuntimeError: matplotlib or jinja2 is not installed.
    """
    pages = environment()
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
    page = pages.get_template("ladder.html").render(comparison=comparison, **numbers, **figures)
    write_text(destination, page.strip())
    return Path(destination)


def _models(comparison: Comparison, runs: Sequence[Run]) -> tuple[dict[str, nn.Module], Tensor]:
    """The lowest seed's model of each rung, and some images.

    At the largest budget that has most of them; what was not run there, at its own largest.
    """
    wanted = [rung for rung in IN_PICTURES if rung in comparison.rungs]
    ladder = max(
        comparison.ladders,
        key=lambda name: (sum(bool(comparison.top1(name, r)) for r in wanted), comparison.steps[name]),
    )
    by_name = {run.path.name: run for run in runs}
    chosen: dict[str, Record] = {}
    for one in sorted(comparison.records, key=lambda one: (one["ladder"] != ladder, -comparison.steps[one["ladder"]])):
        chosen.setdefault(one["rung"], one)
    models = {rung: load(by_name[chosen[rung]["run"]].best()) for rung in wanted if rung in chosen}
    run = next(by_name[one["run"]] for one in comparison.records)
    recipe = run.recipe()
    data = open_dataset(recipe.data, recipe.seed, run.read("data.json"))
    every = max(1, comparison.num_images // NUM_IMAGES)  # of all classes and kinds, whatever the order
    batches = eval_batches(data.splits[comparison.split], preprocessing(recipe.data), every)
    return models, torch.cat([images[:1] for images, _ in batches])[:NUM_IMAGES]


def _rates(models: dict[str, nn.Module], images: Tensor) -> dict[str, list[float]]:
    """Images per second in deploy form by round; rungs of which that is the same network share one measurement."""
    forms = {rung: deploy_form(model) for rung, model in models.items()}
    same = {rung: next(other for other in forms if str(forms[other]) == str(forms[rung])) for rung in forms}
    measured = images_per_s({rung: forms[rung] for rung in dict.fromkeys(same.values())}, images)
    return {rung: measured[other] for rung, other in same.items()}


def _color(comparison: Comparison, rung: str) -> str:
    return COLORS[comparison.rungs.index(rung) % len(COLORS)]


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
    told = set()
    for one in comparison.records:
        if one["ladder"] == ladder and one["rung"] != "labels-long":
            label = one["rung"] if one["rung"] not in told else None
            told.add(one["rung"])
            epochs = range(1, len(one["val_top1"]) + 1)
            axes.plot(epochs, one["val_top1"], "o-", lw=1.3, color=_color(comparison, one["rung"]), label=label)
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="epoch", title=f"validation top-1, %, of {ladder}, each seed")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return svg(figure, "curves")


def _num_rungs(comparison: Comparison, ladder: str) -> int:
    return len({one["rung"] for one in comparison.records if one["ladder"] == ladder})


def forest(comparison: Comparison) -> Any:
    """Every step's paired difference with its 95 % interval, a color for each budget, as a matplotlib figure."""
    from matplotlib.figure import Figure

    rows = comparison.differences()
    figure = Figure(figsize=(11, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#4a5058", lw=1)
    lowest, highest = 0.0, 0.0
    for y, (_, _, found) in enumerate(rows):
        for i, one in enumerate(found):
            if one is None:
                continue
            place = y + (i - (len(found) - 1) / 2) * 0.24
            color = COLORS[i] if one.is_clear else GREY
            axes.plot([one.mean], [place], "os^D"[i % 4], color=color, markersize=5)
            if one.half is not None:
                axes.plot([one.mean - one.half, one.mean + one.half], [place, place], color=color, lw=1.6)
            lowest, highest = min(lowest, *one.by_seed.values()), max(highest, *one.by_seed.values())
    for i, name in enumerate(comparison.ladders):
        axes.plot([], [], "os^D"[i % 4], color=COLORS[i], label=f"{comparison.steps[name]:,} steps")
    margin = 0.25 * (highest - lowest) or 1.0  # an interval of two seeds may be far wider than the picture
    axes.set_xlim(lowest - margin, highest + margin)
    axes.set_yticks(range(len(rows)), [f"{first} → {second}" for first, second, _ in rows])
    axes.invert_yaxis()
    axes.set(
        xlabel="points of top-1", title="the second beside the first, paired by seed, 95 % interval; grey: it holds 0"
    )
    axes.legend(loc="lower right")
    return figure


def _accuracy_over_latency(comparison: Comparison, rates: dict[str, list[float]]) -> str:
    """Top-1 at each budget over the measured time of an image, beside the network that deletes its mixers."""
    from matplotlib.figure import Figure

    first = "deleted" if "deleted" in rates else next(iter(rates))
    base = rates[first]
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    for rung, own in rates.items():
        time = Spread.of([b / a for a, b in zip(own, base, strict=True)])
        for i, name in enumerate(comparison.ladders):
            if not (values := comparison.top1(name, rung)):
                continue
            top1 = sum(values.values()) / len(values)
            color = _color(comparison, rung)
            axes.errorbar(
                [time.median], [top1], xerr=[[time.median - time.low], [time.high - time.median]],
                fmt="os^D"[i % 4], color=color, markersize=6, lw=1,
            )  # fmt: skip
            label = f"{rung}, {comparison.steps[name]:,}"
            axes.annotate(label, (time.median, top1), (6, 4), textcoords="offset points", color=color, fontsize=8)
    axes.margins(0.12)
    title = f"top-1 on {comparison.split}, %, over the time of an image in deploy form; {first} is 1, with quartiles"
    axes.set(xlabel="time, relative", title=title)
    return svg(figure, "latency")


def _features(models: dict[str, nn.Module], images: Tensor) -> str:
    """Distributions of what the first and the last stage put out: the paper's figure."""
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
        axes.set(title=f"behind the {'first' if stage == 0 else 'last'} stage", yscale="log", xlabel="value")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.legend()
    return svg(figure, "features")


def _receptive_fields(models: dict[str, nn.Module], images: Tensor) -> str:
    """Where in the image the middle token of the last stage gets its value from: mean size of the gradient."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.4), layout="constrained")
    for axes, (rung, model) in zip(figure.subplots(1, max(2, len(models))), models.items(), strict=False):
        field = receptive_field(model, images)
        axes.imshow((field / field.max()).sqrt().tolist(), cmap="magma", vmin=0, vmax=1)
        axes.set(title=f"{rung}\n{float((field > 0).float().mean()):.0%} of the image", xticks=[], yticks=[])
        axes.grid(visible=False)
    return svg(figure, "fields")


def receptive_field(model: nn.Module, images: Tensor) -> Tensor:
    """Mean absolute gradient of the middle token behind the last block, over images and channels.

    A norm over the whole map lets every token feel every pixel a little: its statistics are held fixed, so that only
    what carries content from place to place counts.

    Shape: images [N, 3, H, W] -> [H, W].
    """
    held: dict[str, tuple[Tensor, Tensor]] = {}
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0].detach()
            held[name] = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, correction=0)

        return hook

    def fixed(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.GroupNorm, args: tuple[Tensor], output: Tensor) -> Tensor:
            centre, variance = held[name]
            normal = (args[0] - centre) / (variance + module.eps).sqrt()
            return normal * module.weight.view(-1, 1, 1) + module.bias.view(-1, 1, 1)

        return hook

    handles: list[Any] = [module.register_forward_pre_hook(note(name)) for name, module in norms.items()]
    handles += [module.register_forward_hook(fixed(name)) for name, module in norms.items()]
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
