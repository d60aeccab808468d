"""The table of `benchmark.py rounding`."""

from collections.abc import Mapping
from typing import Any


def cost_lines(costs: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    """A line for each precision, under a heading.

    Args:
      costs: from `rounding_cost`.
    """
    lines = ["        weights  perplexity  against f32  same likeliest token"]
    for precision, cost in costs.items():
        change = cost["perplexity"] / costs["f32"]["perplexity"] - 1
        lines.append(
            f"{precision:5}{cost['megabytes']:7.1f} MB{cost['perplexity']:12.3f}{change:13.3%}"
            f"{cost['agreement']:22.2%}"
        )
    return lines
