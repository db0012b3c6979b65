"""Text of a user as Markdown that shows it as it is, in one line."""

import re

from riformer.pages.style import one_line

# Punctuation that Markdown, or GitHub's and the Hub's additions to it (tables, math, links, mentions), gives a meaning.
SPECIAL = re.compile(r"([\\`*\[\]<>|&$~#@:]|\b_|_\b|(?<=\bwww)\.)", re.IGNORECASE)
BARE_BAR = re.compile(r"(?<!\\)\|")


def plain(text: str) -> str:
    """Text for between words, in a heading or in a cell of a table."""
    return SPECIAL.sub(r"\\\1", one_line(text))


def code(text: str) -> str:
    """Text as a code span, between more backticks than it has in a row."""
    text = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def table(heads: list[str], rows: list[list[str]], align: str) -> str:
    """A table of Markdown cells, with `l` or `r` for the alignment of each column."""
    ruler = ["---:" if side == "r" else "---" for side in align]
    lines = [[BARE_BAR.sub(r"\|", cell) for cell in line] for line in [heads, ruler, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
