"""Figures of the parity report, as SVG: two panels over one axis, values above, difference below.

All colours come from the page's style sheet, so that they follow light and dark.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

MOST_POINTS = 4000
"""of a scatter; more would only lie on top of each other"""

_WIDTH, _HEIGHT = 480, 500
_LEFT, _RIGHT, _TOP, _BETWEEN, _BOTTOM = 66, 466, 30, 318, 454
_GAP = 26


@dataclasses.dataclass(frozen=True)
class Axis:
    """A scale from numbers to pixels.

    Attributes:
      label: what it shows.
      low: the number at `start`.
      high: the number at `end`.
      start: in pixels; for a vertical axis its lower end.
      end: in pixels.
      logarithmic: powers of ten at equal distances; `low` and `high` are above 0.
    """

    label: str
    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, values: np.ndarray) -> np.ndarray:
        """Pixels of numbers."""
        low, high = self.low, self.high
        if self.logarithmic:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers, about five."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1, (last - first) // 6 + 1)]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [number * step for number in range(first, last + 1)]

    def name(self, tick: float) -> str:
        """A tick as text: plainly from 0.001 to 99,999."""
        if tick == 0:
            return "0"  # not -0
        if 1e-3 <= abs(tick) < 1e5 and not self.logarithmic:
            return f"{tick:.10g}"
        mantissa, power = f"{tick:.6e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"


def short(value: float, digits: int = 0) -> str:
    """A number in scientific notation and few signs, such as 3e-7; 0, nan and inf as such."""
    if value == 0 or not math.isfinite(value):
        return f"{abs(value) if value == 0 else value:g}"
    mantissa, power = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(power)}"


def scatter(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Finite values of JAX over those of PyTorch, and the difference below: SVG.

    Args:
      ours: at least one value.
      theirs: the same number of values.
    """
    difference = ours - theirs
    both = np.concatenate([ours, theirs])
    low, high = _widened(float(both.min()), float(both.max()))
    most = float(np.abs(difference).max()) or 1.0
    across = Axis("logit in PyTorch", low, high, _LEFT, _RIGHT)
    above = Axis("logit in JAX", low, high, _BETWEEN, _TOP)
    below = Axis("JAX - PyTorch", -1.15 * most, 1.15 * most, _BOTTOM, _BETWEEN + _GAP)
    return _figure(
        "Logits of JAX against those of PyTorch, and their difference",
        across,
        (above, _line(across, above, np.array([low, high]), np.array([low, high]), "guide")
         + _dots(across, above, theirs, ours, "points")),
        (below, _line(across, below, np.array([low, high]), np.zeros(2), "guide")
         + _dots(across, below, theirs, difference, "points off")),
    )  # fmt: skip


def points_to_draw(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Indices of at most `MOST_POINTS` values, the largest differences and the end values in them.

    Half are evenly spaced in the order of their values. Half are chosen by their differences, all
    of the largest and ever fewer of the smaller ones, so that the figure has no step there.
    """
    if ours.size <= MOST_POINTS:
        return np.arange(ours.size)
    half = MOST_POINTS // 2
    by_difference = np.argsort(-np.abs(ours - theirs), kind="stable")
    by_value = np.argsort(theirs, kind="stable")
    return np.union1d(
        by_difference[np.geomspace(1, ours.size, half).astype(int) - 1],
        by_value[np.linspace(0, ours.size - 1, half).astype(int)],
    )


def distances(ours: Sequence[float], theirs: Sequence[float]) -> np.ndarray:
    """Absolute differences at the steps that both runs have; NaN between two infinities."""
    shared = min(len(ours), len(theirs))
    with np.errstate(invalid="ignore"):
        return np.abs(np.subtract(ours[:shared], theirs[:shared]))


def losses(ours: Sequence[float], theirs: Sequence[float], bound: float) -> str:
    """Two runs' losses over the steps, and below how far they are apart: SVG.

    Numbers that are not finite leave a gap; so does a difference of exactly zero, which has no
    place on a logarithmic axis.
    """
    runs = [np.asarray(run, np.float64) for run in (theirs, ours)]
    steps = max(run.size for run in runs)
    every = np.concatenate(runs)
    finite = every[np.isfinite(every)]
    low, high = _widened(float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    apart = distances(ours, theirs)
    seen = apart[np.isfinite(apart) & (apart > 0)]
    floor = min(float(seen.min()) if seen.size else bound / 10, bound / 10) / 2
    ceiling = max(float(seen.max()) if seen.size else bound, bound) * 2
    across = Axis("step", -0.5, max(steps - 0.5, 0.5), _LEFT, _RIGHT)
    above = Axis("loss, nats per token", low, high, _BETWEEN, _TOP)
    below = Axis("difference", floor, ceiling, _BOTTOM, _BETWEEN + _GAP, logarithmic=True)
    drawn = [
        _line(across, above, np.arange(run.size), run, name)
        for run, name in zip(runs, ("theirs", "ours"), strict=True)
    ]
    ends = np.array([across.low, across.high])
    allowed = _line(across, below, ends, np.full(2, bound), "bound")
    level = float(below.at(np.array([bound]))[0])
    allowed += f'<text x="{_RIGHT - 4}" y="{level + 14:.0f}" class="end">allowed</text>'
    shown = np.where(apart > 0, apart, np.nan)
    points = _dots(across, below, np.arange(apart.size), shown, "points off")
    return _figure(
        "Losses of training in JAX and in PyTorch, and their difference",
        across,
        (above, "".join(drawn) + _key()),
        (below, allowed + points),
    )


def _figure(title: str, across: Axis, *panels: tuple[Axis, str]) -> str:
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        f'<text x="{(_LEFT + _RIGHT) / 2:.0f}" y="{_HEIGHT - 8}" class="middle">',
        f"{across.label}</text>",
    ]
    columns = list(zip(across.ticks(), across.at(np.array(across.ticks())), strict=True))
    for axis, marks in panels:
        top, height = axis.end, axis.start - axis.end
        for _, x in columns:
            parts.append(f'<path class="grid" d="M{x:.1f} {top}v{height}"/>')
        for tick, y in zip(axis.ticks(), axis.at(np.array(axis.ticks())), strict=True):
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>')
            parts.append(
                f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" class="end">{axis.name(tick)}</text>'
            )
        middle = (axis.start + axis.end) / 2
        parts.append(
            f'<rect class="frame" x="{_LEFT}" y="{top}" width="{_RIGHT - _LEFT}" '
            f'height="{height}"/><text transform="translate(15 {middle:.0f}) rotate(-90)" '
            f'class="middle">{axis.label}</text>{marks}'
        )
    parts += [
        f'<text x="{x:.1f}" y="{_BOTTOM + 18}" class="middle">{across.name(tick)}</text>'
        for tick, x in columns
        if not (across.label == "step" and tick % 1)
    ]
    return "".join([*parts, "</svg>"])


def _key() -> str:
    """Which line is which, above the upper panel."""
    y = _TOP - 14
    return (
        f'<path class="theirs" d="M{_LEFT + 4} {y}h26"/><text x="{_LEFT + 38}" y="{y + 4}">PyTorch'
        f'</text><path class="ours" d="M{_LEFT + 118} {y}h26"/>'
        f'<text x="{_LEFT + 152}" y="{y + 4}">JAX</text>'
    )


def _dots(across: Axis, up: Axis, x: np.ndarray, y: np.ndarray, kind: str) -> str:
    """Points as one path of lines without length, whose round ends are seen."""
    pixels = zip(across.at(x), up.at(y), strict=True)
    path = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in pixels if math.isfinite(a + b))
    return f'<path class="{kind}" d="{path}"/>'


def _line(across: Axis, up: Axis, x: np.ndarray, y: np.ndarray, kind: str) -> str:
    path, pen = "", "M"
    for a, b in zip(across.at(x), up.at(y), strict=True):
        if math.isfinite(b):
            # Without a length a line is seen where the next point is missing.
            path += f"M{a:.1f} {b:.1f}h0" if pen == "M" else f"L{a:.1f} {b:.1f}"
        pen = "L" if math.isfinite(b) else "M"
    return f'<path class="{kind}" d="{path}"/>'


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range with a margin, which is never empty."""
    margin = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin
