"""Numbers of a report do not depend on the order of sums, nor on digits that depend on the CPU."""

import math

import numpy as np
import pytest

from igd_ds.studies.report.cells import marked
from igd_ds.studies.report.drawing import stable_svg
from igd_ds.studies.report.layout import Cell, formatted
from igd_ds.studies.rounding import mean_sd, on_grid, significant, significant_array


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.123456789, 0.123457),
        (-1.5, -1.5),
        (0.0, 0.0),
        (1.23456789e-12, 1.23457e-12),
        (999999.4, 999999.0),
        (1234567.8, 1234568.0),  # no whole number is lost
        (math.inf, math.inf),
    ],
)
def test_six_significant_digits(value, expected):
    assert significant(value) == expected
    assert significant_array([[value]]).tolist() == [[expected]]


def test_neighbouring_floats_give_one_number():
    random = np.random.default_rng(0)
    for value in random.random(1000).tolist():
        assert significant(value) == significant(math.nextafter(value, 1))


def test_mean_and_deviation_do_not_depend_on_the_order():
    random = np.random.default_rng(1)
    values = (random.random(50) * 10.0 ** random.integers(-9, 9, 50)).tolist()
    expected = mean_sd(values)
    assert expected == pytest.approx((np.mean(values), np.std(values, ddof=1)), rel=1e-12)
    for _ in range(20):
        assert mean_sd(random.permutation(values).tolist()) == expected
    assert mean_sd([0.1, 0.1, 0.1]) == (0.1, 0.0)  # np.std finds 1.7e-17
    assert mean_sd([0.3]) == (0.3, None)
    assert all(map(math.isnan, mean_sd([0.1, math.nan])))


def test_sums_on_the_grid_are_exact():
    random = np.random.default_rng(2)
    values = on_grid(random.uniform(-1, 1, 100_000))
    expected = math.fsum(values)
    assert values.sum() == values[::-1].sum() == np.cumsum(values)[-1] == expected
    halves = on_grid(np.array([1 / 3, 0.1, -1 / 3, -0.1]))
    assert halves.sum() == 0  # in this order 1/3 + 0.1 - 1/3 - 0.1 is not


def test_halves_are_rounded_away_from_zero():
    # The float 0.0375 is below, 0.0385 above the half; both are rounded as a reader expects.
    assert [formatted(value, ".3f") for value in (0.0375, 0.0385, -0.0375)] == [
        "0.038",
        "0.039",
        "-0.038",
    ]
    assert formatted(0.12345, "+.2%") == "+12.35%" and formatted(1234.5, ",.0f") == "1,235"
    assert formatted(7, ",d") == "7" and formatted(0.1, "g") == "0.1"


def test_values_that_differ_in_the_last_digits_are_equally_good():
    rows = [[Cell(0.3)], [Cell(0.1 + 0.2)], [Cell(0.2)]]
    assert [row[0].mark for row in marked(rows, 0)] == ["best", "best", "second"]


def test_svg_coordinates_are_rounded_and_ids_numbered():
    drawing = (
        '<path id="pca4aede640" d="M 37.313756 175.477874 \nL 0 3.5"/> <!-- 0.0000001 -->'
        '<use xlink:href="#pca4aede640" x="47.197985" y="-0.25" transform="scale(0.015625)"/>'
        '<g clip-path="url(#C0_1_ca4aede641)" id="DejaVuSans-13" style="stroke: #aabbccddeeff"/>'
    )
    assert stable_svg(drawing) == (
        '<path id="i0" d="M 37.3138 175.478 \nL 0 3.5"/> <!-- 0.0000001 -->'
        '<use xlink:href="#i0" x="47.198" y="-0.25" transform="scale(0.015625)"/>'
        '<g clip-path="url(#i1)" id="DejaVuSans-13" style="stroke: #aabbccddeeff"/>'
    )
