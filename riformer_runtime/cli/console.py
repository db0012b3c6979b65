"""Consoles on which text is text: names of users in brackets are no markup, and nothing in them moves the cursor."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import console
from rich.logging import RichHandler
from rich.text import Text

BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
"""Characters that change the direction of what follows."""


def printable(text: str, keep: str = "\t") -> str:
    """The text with control characters, line ends, lone surrogates and changes of direction escaped as in a literal."""

    def shown(char: str) -> str:
        code = ord(char)
        escaped = code < 32 or 127 <= code < 160 or 0xD800 <= code < 0xE000 or code in BIDI
        return char.encode("unicode_escape").decode() if escaped and char not in keep else char

    return text if text.isprintable() else "".join(map(shown, text))


class Console(console.Console):
    """A console without markup: styles are arguments, and every string is shown as it is.

    A string that is printed by itself may have several lines, one in a table has one.
    """

    def __init__(self, **settings: Any):
        super().__init__(markup=False, highlight=False, emoji=False, **settings)

    def print(self, *objects: Any, **settings: Any) -> None:
        texts = [Text(printable(value, keep="\n\t")) if isinstance(value, str) else value for value in objects]
        super().print(*texts, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Makes the text of strings inside of what is printed, such as the cells of a table."""
        return super().render_str(printable(text), **settings)

    @contextmanager
    def activity(self, text: str = "") -> Iterator[Callable[[str], None]]:
        """Shows what is being done while it lasts; yields a function that shows another text."""
        with self.status(Text(printable(text))) as status:
            yield lambda text: status.update(Text(printable(text)))


class LogHandler(RichHandler):
    """Shows log records on a console."""

    def __init__(self, console: Console):
        super().__init__(console=console, show_time=False, show_path=False)

    def render_message(self, record: logging.LogRecord, message: str) -> console.ConsoleRenderable:
        return super().render_message(record, printable(message, keep="\n\t"))
