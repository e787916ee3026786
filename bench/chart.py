"""Horizontal bars as SVG, written by hand: a chart for a README needs no plotting library."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#2f6f9f", "#e08a3c", "#7aa650", "#a05195", "#8a8a8a")
WIDTH, LABEL_WIDTH, VALUE_WIDTH = 760, 190, 90
ROW, GAP, TOP = 22, 8, 56


@dataclass(frozen=True)
class Bar:
    """One bar of one or more parts, by name."""

    label: str
    parts: dict[str, float]


@dataclass(frozen=True)
class Chart:
    """Bars of one unit below each other."""

    title: str
    unit: str
    bars: Sequence[Bar]


def draw(chart: Chart) -> str:
    """Draw it as a whole SVG file, on a white ground so that it shows on a dark page too."""
    names = list(dict.fromkeys(name for bar in chart.bars for name in bar.parts))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    most = max(sum(bar.parts.values()) for bar in chart.bars) or 1.0
    height = TOP + len(chart.bars) * (ROW + GAP) + GAP
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13" fill="#222">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="12" y="22" font-size="15" font-weight="bold">{escape(chart.title)}</text>',
        *_legend(colours if len(names) > 1 else {}),
    ]
    for number, bar in enumerate(chart.bars):
        drawn += _bar(bar, TOP + number * (ROW + GAP), most, colours, unit=chart.unit)
    return "\n".join([*drawn, "</svg>", ""])


def _legend(colours: dict[str, str]) -> list[str]:
    drawn: list[str] = []
    left = LABEL_WIDTH
    for name, colour in colours.items():
        drawn.append(f'<rect x="{left}" y="33" width="12" height="12" fill="{colour}"/>')
        drawn.append(f'<text x="{left + 17}" y="44">{escape(name)}</text>')
        left += 40 + 8 * len(name)
    return drawn


def _bar(bar: Bar, top: int, most: float, colours: dict[str, str], *, unit: str) -> list[str]:
    middle = top + ROW // 2 + 5
    drawn = [f'<text x="{LABEL_WIDTH - 10}" y="{middle}" text-anchor="end">{escape(bar.label)}</text>']
    left = float(LABEL_WIDTH)
    for name, value in bar.parts.items():
        width = value / most * (WIDTH - LABEL_WIDTH - VALUE_WIDTH)
        drawn.append(f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{ROW}" fill="{colours[name]}"/>')
        left += width
    total = f"{sum(bar.parts.values()):.3g} {unit}"
    return [*drawn, f'<text x="{left + 6:.1f}" y="{middle}">{escape(total)}</text>']
