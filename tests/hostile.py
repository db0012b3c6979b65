"""Names that users, file systems and attackers give to classes, files, runs and data sets; and what a browser sees."""

from html.parser import HTMLParser

NAMES = {
    "brackets": "lesion [benign]",
    "script": '"><script>alert(1)</script>',
    "image": "<img src=x onerror=alert(1)>",
    "comment": "a <!-- b --> c ]]> d",
    "entities": "salt &amp; pepper &lt;3",
    "quotes": 'it\'s "quoted" `code`',
    "markdown": "[click](http://example.org) **bold** _it_ ~~gone~~ # head",
    "table": "a | b \\| c",
    "template": "{{ 7 * 7 }} {% raw %} {# x #}",
    "mathtext": "$x_1^{2}$ and $unfinished",
    "newline": "two\nlines\r\nand\ttabs",
    "control": "nul\x00bell\x07escape\x1b[31mred\x7f\x85",
    "undecodable": "caf\udce9",
    "underscore": "_hidden from legends",
    "svg": 'url(#a) id="b" href="#c" <metadata>x</metadata>',
    "unicode": "日本 é 🙂",
    "format": "%s {0} {name}",
}


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.text: list[str] = []
        self.values: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attributes)))
        self.values += [value or "" for _, value in attributes]

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def handle_comment(self, data: str) -> None:
        self.elements.append(("<!--", ()))


def parsed(page: str) -> _Page:
    """Elements with the names of their attributes, text, and values of attributes, as a browser reads them."""
    parser = _Page()
    parser.feed(page)
    parser.close()
    return parser


def shown(name: str) -> str:
    """The name as a reader sees it: white space collapsed, what cannot be shown by its symbol."""
    symbols = {"\x00": "␀", "\x07": "␇", "\x1b": "␛", "\x7f": "␡", "\x85": "�", "\r": "␍", "\udce9": "?"}
    return " ".join("".join(symbols.get(character, character) for character in name).split())


def texts(page: str) -> list[str]:
    """Pieces of text between tags, white space collapsed."""
    return [" ".join(piece.split()) for piece in parsed(page).text]
