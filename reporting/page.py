"""A page of headings, paragraphs, tables and pictures, written as Markdown and as one HTML file."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells of text under a title.

    Attributes:
        labels: so many columns, from the first, are words; the others are numbers.
        summary: the row from which on rows are set apart from those above.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str
    labels: int = 1
    summary: int | None = None


@dataclass(frozen=True)
class Picture:
    """A PNG in the report's folder."""

    file: str
    alt: str
    caption: str


Block = Heading | Paragraph | Points | Table | Picture

CSS = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5c5c5c; --rule: #d9d9d9; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a3a3a3; --rule: #3a3a3a; --paper: #161616; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3.5rem 1.5rem 5rem; max-width: 58rem;
  color: var(--ink); background: var(--paper);
  font: 1.0625rem/1.6 Charter, "Bitstream Charter", "Iowan Old Style", Georgia, "DejaVu Serif", serif; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 2rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .75rem; padding-top: .9rem; border-top: 1px solid var(--rule); }
p, ul { max-width: 48rem; margin: .75rem 0; }
p:has(+ ul) { margin: 1.25rem 0 0; color: var(--soft); }
p + ul { margin-top: .25rem; }
ul { padding-left: 1.2rem; }
li { margin: .35rem 0; }
figure { margin: 1.5rem 0 2rem; break-inside: avoid; }
figcaption { color: var(--soft); font-size: .9rem; line-height: 1.5; margin: .6rem 0; max-width: 48rem; }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: 4px; }
@media (prefers-color-scheme: dark) { img { padding: .5rem; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font: .9rem/1.45 system-ui, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums lining-nums;
  border-top: 2px solid var(--ink); border-bottom: 2px solid var(--ink); }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: baseline; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { border-bottom: 1px solid var(--ink); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 400; }
.words td, .words th { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
tr.summary th, tr.summary td { font-style: italic; }
tr.first th, tr.first td { border-top: 1px solid var(--rule); }
@media print {
  @page { margin: 18mm 16mm; }
  :root { --ink: #000; --soft: #444; --rule: #ccc; --paper: #fff; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  h2 { break-after: avoid; }
  tr { break-inside: avoid; }
  table { font-size: 8.5pt; }
  img { width: auto; max-width: 100%; max-height: 225mm; margin: 0 auto; padding: 0; }
  .scroll { overflow: visible; }
}
"""


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The page as Markdown; pictures are linked."""
    return "\n\n".join([f"# {_plain(title)}", *(_markdown(block) for block in blocks)]) + "\n"


def to_html(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The page as HTML that needs no other file; the pictures are read from `folder`."""
    body = "\n".join(_html(block, folder) for block in blocks)
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<h1>{name}</h1>\n{body}\n</body>\n</html>\n"
    )


def _plain(text: str) -> str:
    """Text as Markdown that shows it letter by letter, on one line."""
    return re.sub(r"([\\`*{}\[\]<>|#~]|\b_|_\b)", r"\\\1", " ".join(text.split()))


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {_plain(text)}"
        case Paragraph(text):
            return _plain(text)
        case Points(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Picture(file, alt, caption):
            return f"![{_plain(alt)}]({file})\n\n{_plain(caption)}"
        case Table(header, rows, title, labels):
            aligned = [":--" if i < labels else "--:" for i in range(len(header))]
            lines = [[_plain(cell) for cell in row] for row in (header, *rows)]
            lines.insert(1, aligned)
            return f"{_plain(title)}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Points(items):
            return "<ul>\n" + "\n".join(f"<li>{html.escape(item)}</li>" for item in items) + "\n</ul>"
        case Picture(file, alt, caption):
            data = base64.b64encode((folder / file).read_bytes()).decode()
            picture = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
            return f"<figure>\n{picture}\n<figcaption>{html.escape(caption)}</figcaption>\n</figure>"
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    kinds = ["" if i < table.labels else ' class="number"' for i in range(len(table.header))]
    head = "".join(f"<th{kind}>{html.escape(cell)}</th>" for kind, cell in zip(kinds, table.header, strict=True))
    lines = []
    for number, row in enumerate(table.rows):
        cells = [f'<th scope="row">{html.escape(row[0])}</th>']
        cells += [f"<td{kind}>{html.escape(cell)}</td>" for kind, cell in zip(kinds[1:], row[1:], strict=True)]
        mark = ""
        if table.summary is not None and number >= table.summary:
            mark = ' class="summary first"' if number == table.summary else ' class="summary"'
        lines.append(f"<tr{mark}>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    name = ' class="words"' if table.labels == len(table.header) else ""
    return (
        f"<figure>\n<figcaption>{html.escape(table.title)}</figcaption>\n"
        f'<div class="scroll"><table{name}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
        f"</table></div>\n</figure>"
    )
