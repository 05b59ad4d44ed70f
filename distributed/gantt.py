"""A played pipeline schedule as a picture: one row a device, forward passes blue, backward passes green, waiting white.

The PNG is written directly (W3C, "Portable Network Graphics", third edition): an array of pixels, deflated.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from .pipeline import FORWARD, Played

ROW, GAP = 24, 4  # pixels
COLOURS = {FORWARD: (66, 115, 190), "B": (90, 165, 105)}


def pixels(played: Played, devices: int, width: int = 1200) -> np.ndarray:
    """(height, width, 3) bytes. Shades alternate with the micro-batches."""
    image = np.full((devices * (ROW + GAP) + GAP, width, 3), 255, np.uint8)
    scale = width / played.makespan if played.makespan else 0.0
    for task, (start, end) in played.spans.items():
        top = GAP + task.stage % devices * (ROW + GAP)
        shade = 1.0 if task.micro % 2 else 0.82
        left, right = int(start * scale), max(int(end * scale), int(start * scale) + 1)
        image[top:top + ROW, left:right] = [int(c * shade) for c in COLOURS[task.phase]]
    return image


def write_png(path: Any, image: np.ndarray) -> None:
    """Writes (height, width, 3) bytes as a PNG file."""
    height, width, _ = image.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in image)
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
                           + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))
