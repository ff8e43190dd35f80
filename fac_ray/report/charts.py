"""Charts as inline SVG: numbers come in, escaped markup goes out.

Every function is pure. Colours and line styles are CSS classes (`tone-<name>`) that the page defines for light and dark
mode; every drawn value carries a `<title>`, so that it can be read with a pointer or a screen reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 12, 46
ROW_HEIGHT = 44


class Series(NamedTuple):
    """One line of a chart; `tone` is a CSS class suffix, `notes` one text for each point.

    `band` has a low and a high for each point, or nothing. From the point number `solid` on, the line is drawn thin.
    """

    name: str
    tone: str
    xs: Sequence[float]
    ys: Sequence[float]
    notes: Sequence[str]
    band: Sequence[tuple[float, float]] = ()
    solid: int | None = None


class Part(NamedTuple):
    """One piece of a stacked bar."""

    name: str
    tone: str
    value: float


class Scale(NamedTuple):
    """A linear map from values to places on the drawing."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Place of a value, rounded to a tenth of a drawing unit."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def axis_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high].

    Raises:
        ValueError: `low` is above `high`, or one of them is not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"axis_ticks: needs finite low <= high, got {low} and {high}")
    step = _round_step((high - low or abs(high) or 1.0) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [_trim(k * step) for k in range(first, max(last, first + 1) + 1)]


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    y_text: Callable[[float], str] = lambda value: f"{value:,g}",
    y_high: float | None = None,
    points: bool = False,
) -> Markup:
    """Lines over a shared x axis, both axes from zero; `y_high` fixes the top of the y axis, `points` shows each value
    as a dot and not only under the pointer."""
    x_ticks = axis_ticks(0, max((x for s in series for x in s.xs), default=1))
    tops = [y for s in series for y in (*s.ys, *(high for _, high in s.band))]
    y_ticks = axis_ticks(0, y_high or max(tops, default=1))
    x, y = _scale_x(x_ticks, LEFT), Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    return _figure(
        title,
        HEIGHT,
        *(_y_tick(y.at(tick), y_text(tick)) for tick in y_ticks),
        *(_x_tick(x.at(tick), HEIGHT - BOTTOM, f"{tick:,g}") for tick in x_ticks),
        _x_label(x_label, HEIGHT),
        element("text", y_label, x=-(TOP + HEIGHT - BOTTOM) / 2, y=13, transform="rotate(-90)", class_="label"),
        *(_spread(s, x, y) for s in series if s.band),
        *(_line(s, x, y, "point shown" if points else "point") for s in series),
    )


def dot_chart(
    rows: Sequence[Series], means: Sequence[float], stds: Sequence[float | None], title: str, x_label: str
) -> Markup:
    """One row for each series with a dot for each x, a bar at the mean and, if known, a band of one standard deviation
    to both sides."""
    spreads = list(zip(rows, means, stds, strict=True))
    ends = [mean + sign * (std or 0.0) for _, mean, std in spreads for sign in (-1, 1)]
    values = [x for row in rows for x in row.xs] + ends
    ticks = axis_ticks(min(values), max(values))
    x, bottom = _scale_x(ticks, LEFT + 50), TOP + ROW_HEIGHT * len(rows)
    return _figure(
        title,
        bottom + BOTTOM,
        *(element("line", x1=x.at(t), x2=x.at(t), y1=TOP, y2=bottom, class_="grid") for t in ticks),
        *(_x_tick(x.at(tick), bottom, f"{tick:g}") for tick in ticks),
        _x_label(x_label, bottom + BOTTOM),
        *(_dots(*spread, x, TOP + ROW_HEIGHT * (k + 0.5)) for k, spread in enumerate(spreads)),
    )


def stacked_bar(parts: Sequence[Part], title: str) -> Markup:
    """Parts of a whole side by side, as wide as the page gives room for; parts of zero are left out."""
    whole = sum(part.value for part in parts) or 1
    drawn, start = [], 0.0
    for part in parts:
        width = 1000 * part.value / whole
        if part.value:
            note = element("title", f"{part.name}: {part.value:,g}")
            drawn.append(
                element("rect", note, x=round(start, 1), y=0, width=round(width, 1), height=24, class_=_tone(part.tone))
            )
        start += width
    return _svg(title, "0 0 1000 24", *drawn, preserveAspectRatio="none", class_="bar")


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """One SVG element, text and attribute values escaped; `class_` and `stroke_width` give class and stroke-width."""
    given = Markup("").join(
        Markup(' {}="{}"').format(Markup(name.rstrip("_").replace("_", "-")), value)
        for name, value in attributes.items()
    )
    inside = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), given, inside)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _trim(value: float) -> float:
    return float(f"{value:.10g}")


def _scale_x(ticks: Sequence[float], left: float) -> Scale:
    return Scale(ticks[0], ticks[-1], left, WIDTH - RIGHT)


def _figure(title: str, height: float, *children: Markup) -> Markup:
    return _svg(title, f"0 0 {WIDTH} {height:g}", *children, class_="chart")


def _svg(title: str, view_box: str, *children: Markup, **attributes: object) -> Markup:
    return element("svg", *children, viewBox=view_box, role="img", aria_label=title, **attributes)


def _y_tick(place: float, text: str) -> Markup:
    line = element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=place, y2=place, class_="grid")
    return line + element("text", text, x=LEFT - 8, y=place + 4, class_="tick end")


def _x_tick(place: float, bottom: float, text: str) -> Markup:
    line = element("line", x1=place, x2=place, y1=bottom, y2=bottom + 4, class_="axis")
    return line + element("text", text, x=place, y=bottom + 18, class_="tick")


def _x_label(text: str, height: float) -> Markup:
    return element("text", text, x=(LEFT + WIDTH - RIGHT) / 2, y=height - 6, class_="label")


def _line(series: Series, x: Scale, y: Scale, point: str) -> Markup:
    places = [(x.at(a), y.at(b)) for a, b in zip(series.xs, series.ys, strict=True)]
    last = len(places) if series.solid is None else series.solid
    path = element("polyline", points=_points(places[:last]), class_="line")
    if last < len(places):
        path += element("polyline", points=_points(places[last - 1 :]), class_="line beyond")
        path += element("circle", cx=places[last - 1][0], cy=places[last - 1][1], r=3.5, class_="point shown")
    points = (
        element("circle", element("title", f"{series.name}: {note}"), cx=a, cy=b, r=3.5, class_=point)
        for (a, b), note in zip(places, series.notes, strict=True)
    )
    return element("g", path, *points, class_=_tone(series.tone))


def _spread(series: Series, x: Scale, y: Scale) -> Markup:
    lows, highs = (
        [(x.at(a), y.at(pair[side])) for a, pair in zip(series.xs, series.band, strict=True)] for side in (0, 1)
    )
    area = element("polygon", points=_points([*highs, *reversed(lows)]), class_="spread")
    return element("g", area, class_=_tone(series.tone))


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:g},{b:g}" for a, b in places)


def _dots(row: Series, mean: float, std: float | None, x: Scale, middle: float) -> Markup:
    name = element("text", row.name, x=LEFT + 38, y=middle + 4, class_="tick end")
    dots = (
        element("circle", element("title", f"{row.name}: {note}"), cx=x.at(value), cy=middle, r=4.5, class_="dot")
        for value, note in zip(row.xs, row.notes, strict=True)
    )
    note = element("title", f"{row.name}: mean {mean:.3f}")
    bar = element("line", note, x1=x.at(mean), x2=x.at(mean), y1=middle - 12, y2=middle + 12, class_="mean")
    return element("g", name, _band(row, mean, std, x, middle), *dots, bar, class_=_tone(row.tone))


def _band(row: Series, mean: float, std: float | None, x: Scale, middle: float) -> Markup:
    if std is None:
        return Markup("")
    left, right = x.at(mean - std), x.at(mean + std)
    note = element("title", f"{row.name}: standard deviation {std:.3f}")
    return element("rect", note, x=left, y=middle - 9, width=round(right - left, 1), height=18, rx=3, class_="band")


def _tone(tone: str) -> str:
    return f"tone-{tone}"
