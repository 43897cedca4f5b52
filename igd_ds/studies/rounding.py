"""Arithmetic whose printed result does not depend on the CPU.

The last digits of a floating-point sum depend on the order of its terms, and that order depends on
the vector instructions of the CPU. A report must come out byte for byte on every machine. It is
therefore computed with exactly rounded sums, and its files hold six significant digits.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

DIGITS = 6
"""Significant digits of the numbers in a report's files."""
GRID = 2.0**32
"""`on_grid` rounds to multiples of 1 / GRID."""


def significant(value: float) -> float:
    """Return `value` with six significant digits; from a million on, the nearest whole number.

    Example:
        >>> significant(0.123456789), significant(1234567.8)
        (0.123457, 1234568.0)
    """
    if not math.isfinite(value):
        return value
    return float(f"{value:.{DIGITS}g}") if abs(value) < 10**DIGITS else float(round(value))


def significant_array(values: Iterable[float] | np.ndarray) -> np.ndarray:
    """Return `significant` of every value, float64, in the shape of `values`."""
    array = np.asarray(values, dtype=np.float64)
    return np.array([significant(value) for value in array.flat]).reshape(array.shape)


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (n − 1), which is None for one value.

    Both are computed exactly and rounded once. NaN where a value is not finite.
    """
    if not all(math.isfinite(value) for value in values):
        return math.nan, math.nan
    exact = [float(value) for value in values]
    return statistics.mean(exact), statistics.stdev(exact) if len(exact) > 1 else None


def on_grid(values: np.ndarray) -> np.ndarray:
    """Return `values` (float64) rounded to multiples of 2⁻³².

    Sums of up to two million such values between −1 and 1 are exact in float64, so they do not
    depend on the order of their terms. A sum that should be 0 is 0.
    """
    return np.round(values * GRID) / GRID
