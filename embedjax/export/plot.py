"""Quality against bytes as an SVG picture, drawn by hand: a line a precision, full where rescored, dashed by codes alone."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 64, 150, 40, 52
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442")
"""Okabe and Ito's, which colour-blind readers can tell apart."""

Points = Sequence[tuple[float, float, float]]
"""Bytes of a vector, and what is kept by codes and rescored, as shares."""


def svg(title: str, lines: Mapping[str, Points]) -> str:
    """The picture of named lines; shares above 100 % are drawn where they are. Lines without points are left out."""
    drawn = {name: sorted(points) for name, points in lines.items() if points}
    every = [point for points in drawn.values() for point in points] or [(1.0, 0.95, 1.0)]
    low = math.floor(min(min(point[1:]) for point in every) * 20) / 20
    high = max(1.0, math.ceil(max(max(point[1:]) for point in every) * 20) / 20)
    first = math.floor(math.log2(min(point[0] for point in every)))
    last = max(first + 1, math.ceil(math.log2(max(point[0] for point in every))))
    x = lambda size: LEFT + (math.log2(size) - first) / (last - first) * (WIDTH - LEFT - RIGHT)
    y = lambda share: HEIGHT - BOTTOM - (share - low) / max(high - low, 0.05) * (HEIGHT - TOP - BOTTOM)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 22, title, "start", size=14),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "bytes of a vector"),
    ]
    for step in range(round((high - low) * 20) + 1):
        share = low + step / 20
        parts += [_line([(LEFT, y(share)), (WIDTH - RIGHT, y(share))], "#dddddd", 1)]
        parts += [_text(LEFT - 6, y(share) + 4, f"{share:.0%}", "end")]
    for power in range(first, last + 1):
        parts += [_text(x(2**power), HEIGHT - BOTTOM + 18, f"{2**power:,}")]
    for n, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[n % len(COLOURS)]
        parts += [_line([(x(size), y(codes)) for size, codes, _ in points], colour, 1.5, "5 4")]
        parts += [_line([(x(size), y(rescored)) for size, _, rescored in points], colour, 2)]
        parts += [f'<circle cx="{x(size):.1f}" cy="{y(share):.1f}" r="3" fill="{colour}"/>' for size, _, share in points]
        at = TOP + 12 + 20 * n
        parts += [_line([(WIDTH - RIGHT + 14, at), (WIDTH - RIGHT + 40, at)], colour, 2)]
        parts += [_text(WIDTH - RIGHT + 46, at + 4, name, "start")]
    parts += [_text(WIDTH - RIGHT + 14, TOP + 24 + 20 * len(drawn), "dashed: by codes", "start")]
    return "\n".join([*parts, "</svg>\n"])


def _line(points: Sequence[tuple[float, float]], colour: str, width: float, dashes: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
