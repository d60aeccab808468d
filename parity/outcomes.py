"""What a comparison found, and the table that shows many of them."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Check:
    """The outcome of one comparison: how far two things are apart, and how far they may be."""

    name: str
    """what is compared"""
    largest: float
    """the largest difference; where things are counted, how many differ"""
    bound: float
    """the most it may be; 0 where nothing may differ"""
    shape: tuple[int, ...] = ()
    """of the arrays, or of the largest of them"""
    dtype: str = "float32"
    """what they were computed in"""
    counted: str = ""
    """the outcome in words, where things are counted"""
    where: str = ""
    """the place of the largest difference, where several are compared"""
    details: tuple[str, ...] = ()
    """each thing that differs, named"""

    @property
    def passed(self) -> bool:
        """Whether the difference is within its bound; a NaN is not."""
        return self.largest <= self.bound

    @property
    def figure(self) -> str:
        """What was measured."""
        return self.counted or f"{self.largest:.1e}"

    @property
    def allowed(self) -> str:
        """What it may be."""
        return f"at most {self.bound:.0e}" if self.bound else "all equal"


Prove = Callable[..., None]
"""The tests' fixture `prove`: takes checks, keeps them for the table, fails where one failed."""


def bounded(
    name: str, theirs: ArrayLike, ours: ArrayLike, bound: float, dtype: str = "float32"
) -> Check:
    """Compares two arrays by their largest absolute difference."""
    theirs, ours = np.asarray(theirs), np.asarray(ours)
    if theirs.shape != ours.shape:
        detail = f"shape {ours.shape} in JAX, not {theirs.shape}"
        return Check(name, math.inf, bound, ours.shape, dtype, details=(detail,))
    return Check(name, float(np.abs(ours - theirs).max()), bound, ours.shape, dtype)


def bounded_each(
    name: str,
    differences: Mapping[str, float],
    arrays: Mapping[str, np.ndarray],
    allowed: Mapping[str, float],
    dtype: str = "float32",
) -> Check:
    """One check for differences of many things: the worst for its bound, and each too large.

    Args:
      name: of the check.
      differences: by the things' names.
      arrays: the things, of which the worst one's shape is told.
      allowed: the bound of each.
      dtype: what they were computed in.
    """

    def share(one: str) -> float:
        return float(np.nan_to_num(differences[one] / allowed[one], nan=np.inf))

    worst = max(differences, key=share)
    details = tuple(
        f"{one} differs by {difference:.1e}"
        for one, difference in differences.items()
        if not difference <= allowed[one]
    )
    shape = arrays[worst].shape
    return Check(
        name, differences[worst], allowed[worst], shape, dtype, where=worst, details=details
    )


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference over the norm of theirs: 0 where both are zero, else inf over 0."""
    difference = float(np.linalg.norm(ours.astype(np.float64) - theirs))
    norm = float(np.linalg.norm(theirs.astype(np.float64)))
    if not difference:
        return 0.0
    return difference / norm if norm else math.inf


def worst_of_each(checks: Iterable[Check]) -> list[Check]:
    """One check for all of one name, dtype and bound: that with the largest difference."""
    worst: dict[tuple[str, str, float], Check] = {}
    for check in checks:
        key = check.name, check.dtype, check.bound
        # Not "larger": a NaN must stay.
        if key not in worst or not check.largest <= worst[key].largest:
            worst[key] = check
    return list(worst.values())


def table_of(checks: Iterable[Check], title: str) -> "Table":
    """The checks as a rich table, one row each."""
    from rich.table import Table

    table = Table(title=title)
    for column in ("check", "shape", "dtype", "measured", "where", "allowed", "result"):
        table.add_column(column, overflow="fold")
    for check in checks:
        shape = "x".join(map(str, check.shape))
        result = "ok" if check.passed else "DIFFERS"
        table.add_row(
            check.name, shape, check.dtype, check.figure, check.where, check.allowed, result
        )
    return table
