"""A page of headings, paragraphs, tables and images, written as Markdown and as one HTML file."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jinja2
from tabulate import tabulate

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    tag: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    tag: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class BulletList:
    """A list of sentences."""

    tag: ClassVar[str] = "list"
    sentences: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells of text under a title.

    Attributes:
        labels: so many columns, from the first, hold words; the others hold numbers.
        summary: the first row of those that are set apart at the end; None if there are none.
    """

    tag: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str
    labels: int = 1
    summary: int | None = None


@dataclass(frozen=True)
class Image:
    """A PNG in the report's folder."""

    tag: ClassVar[str] = "image"
    file: str
    alt: str
    caption: str


Block = Heading | Paragraph | BulletList | Table | Image


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The page as Markdown; images are linked."""
    return "\n\n".join([f"# {_escape(title)}", *(_markdown(block) for block in blocks)]) + "\n"


def to_html(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The page as HTML that needs no other file; the images are read from `folder`. All text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda file: base64.b64encode((folder / file).read_bytes()).decode()
    return environment.get_template("report.html").render(title=title, blocks=blocks)


def _escape(text: str) -> str:
    """Text as Markdown that shows every character as it is, on one line."""
    return re.sub(r"([\\`*{}\[\]<>|#~]|\b_|_\b)", r"\\\1", " ".join(text.split()))


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {_escape(text)}"
        case Paragraph(text):
            return _escape(text)
        case BulletList(sentences):
            return "\n".join(f"- {_escape(sentence)}" for sentence in sentences)
        case Image(file, alt, caption):
            return f"![{_escape(alt)}]({file})\n\n{_escape(caption)}"
        case Table(header, rows, title, labels):
            header, *rows = [[_escape(cell) for cell in row] for row in (header, *rows)]
            alignment = ["left" if i < labels else "right" for i in range(len(header))]
            lines = tabulate(rows, header, "pipe", colalign=alignment if rows else None, disable_numparse=True)
            return f"{_escape(title)}\n\n{lines}"
