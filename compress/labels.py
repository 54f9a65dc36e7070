"""Layout of the frontier plots: the KL axis, and labels that cover neither points nor each other.

KL is drawn on a square-root scale. It shows the zero of the unquantized model, which a logarithm cannot, and still
separates near-lossless runs when a 2-bit run shares the plot. By Pinsker's inequality sqrt(KL / 2) bounds the total
variation distance of the two next-token distributions, so equal lengths mean equal bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def kl_ticks(highest: float, gap: float = 0.11) -> list[float]:
    """Zero and round values up to `highest`, at least `gap` of the axis apart on a square-root scale."""
    if highest <= 0:
        return [0.0]
    decade = math.floor(math.log10(highest))
    ticks: list[float] = []
    # from the top, so that the largest round value is always there
    for exponent in range(decade, decade - 4, -1):
        for digit in (5, 2, 1):
            value = float(f"{digit}e{exponent}")
            above = math.sqrt(ticks[-1]) if ticks else math.inf
            low = math.sqrt(value)
            if value <= highest and above - low >= gap * math.sqrt(highest) <= low:
                ticks.append(value)
    return [0.0, *reversed(ticks)]


@dataclass(frozen=True)
class Box:
    """Axis-aligned rectangle in pixels; y grows upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Shared area in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    def outside(self, frame: Box) -> float:
        """Own area that lies outside the frame."""
        return (self.right - self.left) * (self.top - self.bottom) - self.overlap(frame)


@dataclass(frozen=True)
class Placement:
    """Position of a label: `anchor` in the words of plotly (`top center`), box, and ring of the search."""

    anchor: str
    box: Box
    ring: int


# direction (x, y) of each candidate, nearest to what a reader expects first
_ANCHORS = {
    "top center": (0, 1),
    "middle right": (1, 0),
    "bottom center": (0, -1),
    "middle left": (-1, 0),
    "top right": (1, 1),
    "top left": (-1, 1),
    "bottom right": (1, -1),
    "bottom left": (-1, -1),
}


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    rings: Sequence[float] = (8.0,),
    radius: float = 6.0,
) -> list[Placement]:
    """Greedy: each label in turn takes the candidate with the least overlap, near ones first.

    Args:
        points: centre of each marker, pixels.
        sizes: width and height of each label, pixels.
        frame: area that labels should stay in.
        rings: distances from marker to label that may be tried, in order.
        radius: half the size of a marker.
    """
    markers = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    placed: list[Placement] = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        best: tuple[float, Placement] | None = None
        for ring, distance in enumerate(rings):
            for anchor, (dx, dy) in _ANCHORS.items():
                box = _candidate((x, y), (width, height), (dx, dy), distance)
                cost = sum(box.overlap(m) for m in markers) + sum(box.overlap(p.box) for p in placed)
                cost += 4 * box.outside(frame)
                if best is None or cost < best[0] - 1e-9:
                    best = cost, Placement(anchor, box, ring)
            if best is not None and best[0] == 0:
                break
        assert best is not None, "rings is empty"
        placed.append(best[1])
    return placed


def _candidate(
    point: tuple[float, float], size: tuple[float, float], direction: tuple[int, int], distance: float
) -> Box:
    """The label's box when it hangs off the point in a direction."""
    (x, y), (width, height), (dx, dy) = point, size, direction
    if dx and dy:  # diagonal: the same distance along the diagonal
        distance *= 0.7
    left = x + dx * distance - (width / 2 if dx == 0 else width if dx < 0 else 0)
    bottom = y + dy * distance - (height / 2 if dy == 0 else height if dy < 0 else 0)
    return Box(left, bottom, left + width, bottom + height)
