"""What all pages share: colors, figures as inline SVG, templates, and user text made fit to be shown."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from riformer.atomic import write_text

REFERENCE = re.compile(r'(\bid="|url\(#|href="#)')
TEMPLATES = Path(__file__).with_name("templates")
ACCENT, GREY = "#0b5ea8", "#7d848d"
PALETTE = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")  # Okabe and Ito's, for the color-blind
STYLE: dict[str, Any] = {
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), "#c4c8ce"),
    **dict.fromkeys(("axes.titlecolor", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), "#4a5058"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    **dict.fromkeys(("font.size", "axes.titlesize", "legend.fontsize"), 9),
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": "#eceef1", "axes.titlelocation": "left"},
    **{"lines.linewidth": 2, "lines.markersize": 4, "svg.fonttype": "none", "svg.hashsalt": "riformer"},
}
# Control characters by their symbols (U+2400 and after); those without a symbol, and U+FFFE and U+FFFF, by U+FFFD.
SYMBOLS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys((*range(0x80, 0xA0), 0xFFFE, 0xFFFF), 0xFFFD),
}


def readable(text: str) -> str:
    """Text of a user in which every character can be written and seen; it is not yet escaped.

    Control characters, which HTML, XML and fonts do not know, become symbols such as ␀. Bytes of a file name that are
    not UTF-8 become question marks.
    """
    return text.translate(SYMBOLS).encode("utf-8", "replace").decode()


def one_line(text: str, most: int = 0) -> str:
    """Readable text with white space collapsed; where `most` is given, no longer than so many characters."""
    text = " ".join(readable(text).split())
    return text if not most or len(text) <= most else text[: most - 1] + "…"


def templates() -> Any:
    """The Jinja2 environment of the pages, in which every value is made readable and escaped.

    Raises:
        RuntimeError: matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2
        import markupsafe
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError("a report needs matplotlib and jinja2: pip install 'riformer[report]'") from error
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_readable_value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.globals["css"] = markupsafe.Markup((TEMPLATES / "page.css").read_text(encoding="utf-8"))
    return pages


def _readable_value(value: Any) -> Any:
    is_markup = hasattr(value, "__html__")
    return readable(str(value)) if isinstance(value, str | Path) and not is_markup else value


def write_page(pages: Any, template: str, destination: Path, **values: Any) -> Path:
    """Renders a template of `templates()` into one HTML file and returns its path."""
    write_text(destination, pages.get_template(template).render(**values).strip() + "\n")
    return Path(destination)


@contextmanager
def drawing(style: Mapping[str, Any] = STYLE) -> Iterator[None]:
    """Matplotlib with its own defaults and a style, whatever the user has configured."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the browser has the glyphs that matplotlib's font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield


def svg(figure: Any, name: str) -> Any:
    """The figure as an inline SVG element, which templates do not escape again.

    Its ids begin with `name`, and it has no references to other files.
    """
    from markupsafe import Markup

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(REFERENCE, rf"\1{name}-", tag[0]), text[text.index("<svg") :])
    return Markup(re.sub(r'^<svg .*?viewBox="([^"]*)".*?>', r'<svg viewBox="\1">', text, flags=re.DOTALL))
