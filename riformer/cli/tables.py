"""What the command line prints about finished runs and about a dry run."""

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.measure import Measurement
from rich.table import Column, Table

from riformer.measure.dryrun import Projection
from riformer.measure.profile import Profile
from riformer.train.run import Run
from riformer_runtime.cli.console import Console, printable


def print_projections(projections: list[Projection], console: Console) -> None:
    """What takes part, what was timed, and a row for each training: memory, and times up to the whole of it."""
    table = Table(Column("training", no_wrap=True), "memory", "a step", "an epoch", "in all", box=SIMPLE_HEAD)
    lines: list[str] = []  # each once, because a student and its teacher share some
    for p in projections:
        facts = [f"{p.name}: {p.model}", *p.teachers, *p.pairs, *[f"note: {note}" for note in p.notes]]
        lines += [line for line in facts if line not in lines]
        epoch = f"{_duration(p.epoch_seconds)}, {p.steps_per_epoch:,} steps"
        total = f"{_duration(p.total_seconds)}, {p.epochs:,} epochs"
        table.add_row(p.name, f"{p.memory / 1e9:.1f} GB", _duration(p.step_seconds), epoch, total)
    for p in projections:
        lines.append(
            f"{p.name}: a step of {p.batch_size:,} images = {p.batch_size / p.timed_images:g} x "
            f"{_duration(p.timed_seconds)} for {p.timed_images} images forward and backward + "
            f"{_duration(p.update_seconds)} for the update"
        )
    for line in lines:
        console.print(printable(line), soft_wrap=True)
    console.print(table)
    in_all = _duration(sum(p.total_seconds for p in projections))
    console.print(
        f"{in_all} on one {projections[0].device}, without reading images and without evaluation; nothing was written",
        soft_wrap=True,
    )


def _duration(seconds: float) -> str:
    """A time in the largest unit in which it is at least 2."""
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{1000 * seconds:.0f} ms"


def print_runs(runs: list[Run], console: Console) -> None:
    """The evaluations of these runs, as far as there are any."""
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if evaluation := run.read("evaluation.json"):
            by_recipe.setdefault(run.recipe().name, []).append(evaluation)
    print_evaluations(by_recipe, console)


def print_evaluations(by_recipe: dict[str, list[dict[str, Any]]], console: Console) -> None:
    """A row for each recipe: accuracy before and after the fuse; where there is one, the teacher's, and the speed."""
    evaluations = [evaluation for group in by_recipe.values() for evaluation in group]
    if not evaluations:
        return
    has_teacher = any("teacher" in e["models"] for e in evaluations)
    headings = ["student", "fused", "each seed"]
    headings = ["teacher", *headings, "speed"] if has_teacher else headings
    table = Table(Column("recipe", no_wrap=True), *headings, box=SIMPLE_HEAD)
    for name, group in by_recipe.items():
        fused = [e["models"]["deploy"]["top1"] for e in group]
        ratios = [e["speed"]["ratio"]["median"] for e in group if "ratio" in e["speed"]]
        cells = [_mean(e["models"]["student"]["top1"] for e in group), _mean(fused)]
        cells.append(" ".join(f"{value:.1f}" for value in fused))
        if has_teacher:
            teacher = _mean(e["models"]["teacher"]["top1"] for e in group if "teacher" in e["models"])
            cells = [teacher, *cells, f"{_mean(ratios)} x" if ratios else ""]
        table.add_row(name, *cells)
    console.print(table)
    console.print("; ".join(_about(evaluations)))


def _about(evaluations: list[dict[str, Any]]) -> list[str]:
    """What the numbers in the table are, and what all networks have in common."""
    about = [f"top-1 % on {', '.join(sorted({e['split'] for e in evaluations}))}"]
    if any("ratio" in e["speed"] for e in evaluations):
        about.append("speed of the fused student over its teacher")
    sizes = {(e["models"]["deploy"]["params"], e["models"]["deploy"]["macs"]) for e in evaluations}
    about += [f"{params:,} parameters, {macs / 1e6:,.1f} M MACs" for params, macs in sizes if len(sizes) == 1]
    merged = [e for e in evaluations if e["models"]["student"]["params"] != e["models"]["deploy"]["params"]]
    if merged:
        difference = max(e["fuse"]["max_rel"] for e in merged)
        about.append(f"the fuse changes logits by {difference:.0e} of the largest at most")
    return about


def _mean(values: Iterable[float]) -> str:
    values = list(values)
    return f"{fmean(values):.2f}" if values else ""


def print_bench(result: dict[str, Any], console: Console) -> None:
    """Tables of a bench, one a group. Each rate with half its quartiles' distance."""
    models = {entry["model"] for entry in result["competitors"]}
    for group in result["groups"]:
        title = f"{group['img_size']} px, batch {group['batch_size']}, threads {group['num_threads']}"
        peaks = ", ".join(f"{name} {rate / 1e9:,.0f} GMAC/s" for name, rate in group["macs_per_s_peak"].items())
        caption = f"{group['env']['device']}; peak of products in the first-level cache or one large one: {peaks}"
        numbers = [
            Column(h, justify="right") for h in ("images/s", "to first", "products", "peak", "MiB", "error", "top-1")
        ]
        if len(models) == 1:
            title = f"{next(iter(models))}, {title}"
        table = Table("", *numbers, title=title, caption=caption, box=SIMPLE_HEAD)
        for row in group["rows"]:
            rate, alone = row["images_per_s"], row.get("of_products_alone")
            table.add_row(
                f"{row['model'] if len(models) > 1 else ''} {row['backend']} {row['precision']}".strip(),
                f"{rate['median']:,.4g} ±{(rate['high'] - rate['low']) / rate['median'] / 2:.0%}",
                f"{row['ratio']['median']:.2f}×",
                f"{alone['median']:.0%}" if alone else "–",
                f"{row['of_peak']:.0%}" if alone else "–",
                "–" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
                f"{row['max_rel']:.0e}",
                f"{row['top1_agreement']:.0%}",
            )
        table.width = Measurement.get(console, console.options.update(width=200), table).maximum  # no number is cut
        console.print(table, crop=False)


def print_profile(profile: Profile, title: str, console: Console) -> None:
    """What each part adds and takes in place, and whether the parts add up to the whole."""
    added = {step.name: step for step in profile.steps}
    numbers = [Column(h, justify="right") for h in ("built up", "adds", "in place", "share", "GMACs", "MB moved")]
    table = Table(Column("part", no_wrap=True), *numbers, title=f"{title}, ms a batch", box=SIMPLE_HEAD)
    for kind, part in profile.by_kind().items():
        step = added.get(kind)
        table.add_row(
            kind,
            f"{step.latency_ms.median:.2f}" if step else "",
            f"{step.added_ms:+.2f}" if step else "",
            f"{part['latency_ms']:.2f}",
            f"{part['share']:.1%}",
            f"{part['macs'] / 1e9:.3f}",
            f"{part['num_bytes'] / 1e6:.1f}",
        )
    whole = profile.whole_ms
    table.add_row("sum", "", "", f"{profile.sum_ms:.2f}")
    table.add_row("the whole, no clocks", f"{whole.median:.2f}", "", f"{whole.median:.2f}")
    console.print(table)
    built_up, in_place = profile.mixer_share_built_up, profile.mixer_share_in_place
    verdict = "" if profile.adds_up else ": they do NOT add up within 5 %, so trust neither; use a quieter machine"
    console.print(
        f"token mixers: {built_up:.1%} built up (without the head), {in_place:.1%} in place; "
        f"the parts are {profile.sum_of_whole:.1%} of the whole{verdict}"
    )
