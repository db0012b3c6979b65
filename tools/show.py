"""Writes the recorded results into docs/ and the README, between their markers, and draws the ladder's figure.

python tools/show.py
"""

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

from riformer.atomic import replace_file, write_text
from riformer.measure.quoted import LADDER, QUOTED
from riformer.pages.ladder import forest
from riformer.pages.speed import network_name, where
from riformer.pages.style import drawing
from riformer.study.comparison import Comparison, markdown

INSTRUCTIONS = {"amx": "AMX", "avx512_bf16": "AVX-512 and its bf16", "avx512": "AVX-512", "avx2": "AVX2"}
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def table(result: dict[str, Any]) -> str:
    """A bench as Markdown: ratios to the first row with the share of the device's peak, memory, largest error."""
    groups = result["groups"]
    several = len({row["model"] for row in groups[0]["rows"]}) > 1
    header = [""] + (["top-1, quoted"] if several else []) + [where(group) for group in groups]
    memory = [group for group in groups if group["rows"][0]["peak_mib"] is not None]
    header += [f"MiB at {where(group)}" for group in memory] + ["error"]
    lines = [header, ["---"] * len(header)]
    for i, first in enumerate(groups[0]["rows"]):
        rows = [group["rows"][i] for group in groups]
        engine = f"{first['backend']} {first['precision']}"
        cells = [f"{network_name(first['model'])}, {engine}" if several else engine]
        if several:
            cells.append(f"{QUOTED[first['model']].top1:.1f}" if first["model"] in QUOTED else "–")
        for row in rows:
            share = f" ({row['of_peak']:.0%})" if "of_peak" in row else ""
            cells.append(f"{row['ratio']['median']:.2f}×{share}")
        cells += [f"{group['rows'][i]['peak_mib']:.0f}" for group in memory]
        lines.append([*cells, f"{max(row['max_rel'] for row in rows):.0e}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pace(result: dict[str, Any]) -> str:
    """A bench over image sizes as Markdown: pixels per second beside the first size, of the fastest turns."""
    groups = result["groups"]
    lines = [["", *(f"{group['img_size']} px" for group in groups)], ["---"] * (len(groups) + 1)]
    for i, first in enumerate(groups[0]["rows"]):
        pixels = [max(group["rows"][i]["rates"]) * group["img_size"] ** 2 for group in groups]
        lines.append([f"{first['backend']} {first['precision']}", *(f"{value / pixels[0]:.3f}" for value in pixels)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shares(folder: Path) -> str:
    """The latency analyses in a folder as Markdown."""
    lines = ["| | token mixers, built up | in place | the parts, of the whole |", "|---|---|---|---|"]
    for file in sorted(folder.glob("*.json")):
        profile = json.loads(file.read_text())
        built_up, in_place = profile["mixer_share_built_up"], profile["mixer_share_in_place"]
        name = network_name(profile["model"])
        lines.append(f"| {name} | {built_up:.1%} | {in_place:.1%} | {profile['sum_of_whole']:.1%} |")
    return "\n".join(lines)


def installations(result: dict[str, Any]) -> str:
    """What each installation weighs as Markdown, and the time to its first answer."""
    lines = ["| pip install | engine | environment | first answer, beside `python -c pass` |", "|---|---|---|---|"]
    for row in result["rows"]:
        times = row["times_python"]
        spread = f"{times['median']:.0f}× ({times['low']:.0f} to {times['high']:.0f})"
        lines.append(f"| `{row['install']}` | {row['engine']} | {row['size_mb']:.0f} MB | {spread} |")
    return "\n".join(lines)


def headline(result: dict[str, Any]) -> str:
    """The runtime in bf16 beside eager float32 and the fastest other engine, of eight images on one thread."""
    group = next(group for group in result["groups"] if (group["batch_size"], group["num_threads"]) == (8, 1))
    rows = group["rows"]
    ours = next(row for row in rows if (row["backend"], row["precision"]) == ("ours", "bf16"))
    others = [row for row in rows if row["backend"] != "ours"]
    other = max(others, key=lambda row: row["images_per_s"]["median"])
    ratio = median(a / b for a, b in zip(ours["rates"], other["rates"], strict=True))
    instructions = INSTRUCTIONS[group["env"]["instruction_sets"][0]]
    return (
        f"On one core with {instructions}, eight images at once, a {network_name(ours['model'])} in bf16 runs "
        f"{ours['ratio']['median']:.1f} times as fast as in eager float32 and {ratio:.2f} times as fast as on the "
        f"fastest other engine ({other['backend']} {other['precision']}): {ours['of_peak']:.0%} of what the core's "
        f"multipliers can do, in {ours['peak_mib']:.0f} MiB beside {other['peak_mib']:.0f}."
    )


def ladder() -> Comparison:
    """The records of the ladder."""
    return Comparison(json.loads(file.read_text()) for file in sorted((RESULTS / "ladder").glob("*.json")))


def blocks() -> dict[Path, dict[str, str]]:
    """The text between the markers of each page, by marker."""

    def read(name: str) -> dict[str, Any]:
        return json.loads((RESULTS / f"{name}.json").read_text())

    made = {"latency": shares(RESULTS / "latency")}
    for machine in ("amx", "avx512_bf16"):
        for file in (RESULTS / machine).glob("*.json"):
            name = f"{machine}/{file.stem}"
            made[name] = pace(read(name)) if file.stem == "resolution" else table(read(name))
    comparison = ladder()
    sentences = "\n".join(comparison.headline())
    return {
        ROOT / "docs" / "speed.md": made,
        ROOT / "docs" / "deploy.md": {"install": installations(read("install"))},
        ROOT / "docs" / "results.md": {"ladder_headline": sentences, "ladder": markdown(comparison, LADDER)},
        ROOT / "README.md": {"speed": headline(read("amx/cpu_riformer_s12")), "ladder": sentences},
    }


def main() -> None:
    for path, texts in blocks().items():
        page = path.read_text()
        for name, text in texts.items():
            marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
            page, count = marked.subn(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
            if count != 1:
                raise SystemExit(f"{path} has {count} places for {name}")
        write_text(path, page)
    with drawing(), replace_file(RESULTS / "ladder.svg") as beside:
        forest(ladder()).savefig(beside, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
