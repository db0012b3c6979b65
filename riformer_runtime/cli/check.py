"""The verb check: whether an artefact is whole and still computes what it should."""

import json
from dataclasses import asdict

from rich.table import Table

from riformer_runtime.artifact import Artifact
from riformer_runtime.check import Check, check
from riformer_runtime.cli.options import console, errors, verb_parser

EXAMPLES = (
    ("riformer check exported/", "all that riformer export checked, on this machine"),
    ("riformer check exported/ --json", "a line of JSON for each payload"),
)


def check_verb(argv: list[str]) -> int:
    """Verifies an exported artefact: checksums of all files, and each payload on its engine against the training form.

    The probe images in the artefact go through each payload in batches of several sizes, and at another image size
    where the payload takes any. The exit code is 1 where anything is wrong. PyTorch is not needed.
    """
    parser = verb_parser("check", check_verb, EXAMPLES)
    parser.add_argument("artifact", type=str, help="what riformer export wrote: a folder or an .onnx file")
    trusted_help = "also run payloads whose files can run code of their own (pt2, aoti)"
    parser.add_argument("--trusted", action="store_true", help=trusted_help)
    parser.add_argument("--json", action="store_true", help="a JSON line for each payload instead of a table")
    options = parser.parse_args(argv)
    artifact = Artifact(options.artifact)
    found: list[Check] = []
    with errors.activity("checking") as show:
        for one in check(artifact, options.trusted):
            found.append(one)
            show(f"checked {one.payload}")
    if options.json:
        for one in found:
            console.out(json.dumps(asdict(one)), highlight=False)
    else:
        console.print(table_of(found))
        for text in dict.fromkeys(f"{one.payload}: {one.problem or one.skipped}" for one in found):
            if not text.endswith(": "):
                console.print(text, soft_wrap=True)
        manifest = artifact.manifest
        console.print(
            f"{manifest.architecture}, {manifest.num_classes} classes, exported {manifest.environment.get('date')}"
        )
    return int(any(one.problem for one in found))


def table_of(found: list[Check]) -> Table:
    """A row for each payload: where it ran, how far it is from the training form, and what is wrong with it."""
    table = Table("payload", "ran on", "largest difference", "same class", "result")
    for one in found:
        numbers = (f"{one.parity['max_rel']:.1e}", f"{one.parity['top1_agreement']:.1%}") if one.parity else ("", "")
        result = "wrong" if one.problem else "not run" if one.skipped else "right"
        table.add_row(str(one.payload), one.engine, *numbers, result)
    return table


def table_of_payloads(artifact: Artifact) -> Table:
    """A row for each payload, with what the manifest says of it."""
    headings = ("payload", "size", "largest difference", "same class", "images/s", "top-1")
    table = Table(*headings, title=str(artifact.path))
    for payload in artifact.payloads:
        sizes = [(artifact.path / name).stat().st_size for name in payload.files if artifact.path.is_dir()]
        size = sum(sizes) if sizes else artifact.path.stat().st_size
        accuracy = payload.accuracy
        table.add_row(
            str(payload),
            f"{size / 2**20:.1f} MiB",
            f"{payload.parity['max_rel']:.1e}",
            f"{payload.parity['top1_agreement']:.1%}",
            f"{payload.speed['images_per_s']:,.0f}",
            f"{accuracy['top1']:.2f} % ({accuracy['top1'] - accuracy['top1_fp32']:+.2f})" if accuracy else "",
        )
    return table
