"""The `riformer` command. Answers --help, --version and unknown verbs at once; for the rest it imports the package.

`import riformer` imports timm and torch, which takes seconds; this module stays outside the package for that reason.
"""

import sys
from difflib import get_close_matches

VERBS = {
    "train": "train a network, and its teacher first where the recipe says so; or resume a run",
    "ladder": "train rungs of a comparison over several seeds",
    "eval": "accuracy before and after the fuse, of a run or of any saved model on any data",
    "fuse": "write the deploy form of a run or model, checked equal",
    "predict": "label images",
    "profile": "where a network's time goes, and the share of its token mixers",
    "bench": "images per second of networks on engines, side by side",
    "publish": "write a run's model with a card, for timm and the Hugging Face Hub",
    "convert": "read an mmpretrain, PoolFormer or timm checkpoint, write safetensors",
    "report": "one HTML page about one or more runs",
    "list": "models, mixers, recipes, rungs and data sets",
}

HELP = """usage: riformer VERB [options]

RIFormer: vision backbones without token mixers, and the training that keeps their accuracy.

verbs:
{verbs}

riformer VERB --help explains a verb's options; riformer --version prints the version.

start here:
  riformer train                                             the whole idea on built-in digits
  riformer train --recipe photos --data.name folder:PATH     the same on your own images
  riformer report runs                                       a page about what came out
"""


def main() -> None:
    """Entry point of the console script."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {name:9} {text}" for name, text in VERBS.items())), end="")  # noqa: T201
    elif verb == "--version":
        from importlib.metadata import version

        print(f"riformer {version('riformer')}")  # noqa: T201
    elif verb not in VERBS:
        near = get_close_matches(verb, VERBS)
        sys.exit(f"riformer: no verb {verb!r}; {f'did you mean {near[0]}?' if near else 'see riformer --help'}")
    else:
        from riformer import cli

        sys.exit(cli.run(verb, sys.argv[2:]))


if __name__ == "__main__":
    main()
