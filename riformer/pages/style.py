"""What all pages share: colors, figures as inline SVG, and templates with the style sheet page.css beside this file."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ACCENT, GREY = "#0b5ea8", "#7d848d"
PALETTE = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")  # Okabe and Ito's, for all kinds of eyes
STYLE: dict[str, Any] = {
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), "#c4c8ce"),
    **dict.fromkeys(("axes.titlecolor", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), "#4a5058"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    **dict.fromkeys(("font.size", "axes.titlesize", "legend.fontsize"), 9),
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": "#eceef1", "axes.titlelocation": "left"},
    **{"lines.linewidth": 2, "lines.markersize": 4, "svg.fonttype": "none", "svg.hashsalt": "riformer"},
}


def environment() -> Any:
    """Jinja2 as the pages use it.

    Raises:
        RuntimeError: matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2
        import markupsafe
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError("a report needs matplotlib and jinja2: pip install 'riformer[report]'") from error
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.globals["css"] = markupsafe.Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8"))
    return pages


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib in the pages' style."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's font lacks are drawn by the browser
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def svg(figure: Any, name: str) -> str:
    """The figure as an inline SVG element, with ids of its own and without outward references."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg[svg.index("<svg") :])
    return re.sub(r'^<svg .*?viewBox="([^"]*)".*?>', r'<svg viewBox="\1">', svg, flags=re.DOTALL)
