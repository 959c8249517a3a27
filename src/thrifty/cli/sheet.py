"""Contact sheets: photographs enlarged on one PNG, what they are and cost beneath each. Needs Pillow 10.1, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.cli.options import may_write
from thrifty.errors import ThriftyError
from thrifty.files import replacing

EDGE = 128
"""Pixels of a photograph's sides on the sheet."""

GAP, MARGIN, LINE, TITLE = 12, 24, 18, 30
"""Pixels between photographs, around all, of a line of text and of a title."""

INK, FAINT, RIGHT, WRONG = "#1f2933", "#67727e", "#2d6a4f", "#b3261e"
SOFTWARE = "thrifty demo"
"""Stands in the file, so that a sheet is known again."""


@dataclass(frozen=True)
class Tile:
    """A photograph: its file, its class, what was predicted, and what it cost, as text."""

    path: Path
    label: str
    prediction: str
    cost: str


@dataclass(frozen=True)
class Section:
    """Photographs of one model under a title, in rows that have titles too."""

    title: str
    rows: tuple[tuple[str, Sequence[Tile]], ...]


def check_free(path: Path) -> None:
    """Refuse a place that a sheet must not be written to.

    Raises:
        ThriftyError: the name doesn't end in .png, or there is something that is no earlier sheet.
    """
    if path.suffix.lower() != ".png":
        raise ThriftyError(f"the report is {path}, but must end in .png.")
    if not may_write(path, SOFTWARE):
        raise ThriftyError(f"{path} exists and is no report of thrifty demo. Choose another --report.")


def draw(title: str, sections: Sequence[Section], path: Path) -> None:
    """Write the sheet as PNG.

    Raises:
        ThriftyError: the file cannot be written.
    """
    from PIL import Image, ImageDraw  # noqa: PLC0415 (an extra)
    from PIL.PngImagePlugin import PngInfo  # noqa: PLC0415

    rows = [row for section in sections for row in section.rows]
    columns = max(len(tiles) for _, tiles in rows)
    row_height = LINE + GAP // 2 + EDGE + 3 * LINE + GAP
    height = 2 * MARGIN + 2 * TITLE + len(sections) * (TITLE + GAP) + len(rows) * row_height
    width = max(2 * MARGIN + columns * (EDGE + GAP) - GAP, 720)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    y = MARGIN
    _write(pen, (MARGIN, y), title, INK, 22)
    y += 2 * TITLE - GAP
    for section in sections:
        _write(pen, (MARGIN, y), section.title, INK, 17)
        y += TITLE
        for name, tiles in section.rows:
            _write(pen, (MARGIN, y), name, FAINT, 14)
            for index, tile in enumerate(tiles):
                x = MARGIN + index * (EDGE + GAP)
                with Image.open(tile.path) as photograph:
                    enlarged = photograph.convert("RGB").resize((EDGE, EDGE), Image.Resampling.NEAREST)
                below = y + LINE + GAP // 2
                sheet.paste(enlarged, (x, below))
                below += EDGE + 3
                _write(pen, (x, below), tile.label, INK, 14)
                colour = RIGHT if tile.prediction == tile.label else WRONG
                _write(pen, (x, below + LINE), f"taken for {tile.prediction}", colour, 13)
                _write(pen, (x, below + 2 * LINE), tile.cost, FAINT, 13)
            y += row_height
        y += GAP
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=info)


def _write(pen: Any, at: tuple[int, int], text: str, colour: str, size: int) -> None:
    from PIL import ImageFont  # noqa: PLC0415

    pen.text(at, text, fill=colour, font=ImageFont.load_default(size))
