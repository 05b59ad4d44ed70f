"""Digits as text for a terminal and as a PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SHADES = " .:-=+*#%@"


def as_text(image: np.ndarray) -> list[str]:
    """A (28, 28) picture in [0, 1] as 14 lines of 28 characters: two rows of pixels to a line, since a character is
    about twice as high as wide."""
    rows = image.reshape(14, 2, 28).mean(axis=1)
    return ["".join(SHADES[min(int(v * len(SHADES)), len(SHADES) - 1)] for v in row) for row in rows]


def side_by_side(images: np.ndarray, captions: list[str], columns: int = 4) -> str:
    """Pictures (count, 28, 28) in rows of `columns`, a caption under each."""
    blocks = [[*as_text(image), caption.center(28)] for image, caption in zip(images, captions, strict=True)]
    rows = []
    for start in range(0, len(blocks), columns):
        rows += ["  ".join(line).rstrip() for line in zip(*blocks[start : start + columns], strict=True)]
    return "\n".join(rows)



def write_png(images: np.ndarray, captions: list[str], path: Path, columns: int = 4, scale: int = 5) -> None:
    """Writes pictures (count, 28, 28) in [0, 1] in rows of `columns`, each with its caption, as one PNG."""
    from PIL import Image, ImageDraw  # of the extra `demo`

    side, line = 28 * scale, 22
    rows = -(-len(images) // columns)
    sheet = Image.new("L", (columns * (side + 10) + 10, rows * (side + line + 10) + 10), 255)
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 10 + (i % columns) * (side + 10), 10 + (i // columns) * (side + line + 10)
        digit = Image.fromarray((255 - 255 * image).astype(np.uint8))
        sheet.paste(digit.resize((side, side), Image.Resampling.NEAREST), (x, y))
        draw.text((x + 2, y + side + 4), caption, fill=0)
    sheet.save(path)
