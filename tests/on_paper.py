"""Examples small enough to check on paper, for the oracle and both implementations. Expected values are literals."""

import numpy as np
import pytest

# Who is chosen, of four experts in two groups: two, within one group. In sixteenths:
#
#     scores      10  0 | 6 5      the two largest: 10 | 11     the largest: 10 | 6
#     bias        -2 -3 |-5 -3
#     with it      8 -3 | 1 2                        5 |  3                   8 | 2
#
# Of 8 -3 the second is below zero: what lies outside wins over it where it counts as zero, the lower id first.
SCORES_BY_GROUP = [10 / 16, 0, 6 / 16, 5 / 16]
SELECTION_BIAS = [-2 / 16, -3 / 16, -5 / 16, -3 / 16]
GROUPS = pytest.mark.parametrize(
    ("changes", "bias", "ids"),
    [
        ({"groups": 1}, False, [0, 2]),
        ({}, False, [2, 3]),
        ({"outside_groups": "zero"}, False, [2, 3]),
        ({"group_score": "max"}, False, [0, 1]),
        ({"groups": 1}, True, [0, 3]),
        ({}, True, [0, 1]),
        ({"outside_groups": "zero"}, True, [0, 2]),
        ({"group_score": "max"}, True, [0, 1]),
        ({"top_groups": 2}, True, [0, 3]),
    ],
)

# What an expert of gpt-oss does, with a clamp at 2: quick_gelu(min(gate, 2)) * (up, at most 2 and at least -2, + 1).
#
#     quick_gelu(a) = ln 3 / 1.702 * 3/4 for a = ln 3 / 1.702      its slope  3/4 + ln 3 * 3/4 * 1/4
#     quick_gelu(2) = 2 / (1 + exp(-3.404))
A, AT_A, SLOPE = np.log(3) / 1.702, np.log(3) / 1.702 * 3 / 4, 3 / 4 + np.log(3) * 3 / 16
AT_2 = 2 / (1 + np.exp(-3.404))
CLAMPED = [
    # gate, up; hidden, its slopes by gate and by up
    (A, 1, AT_A * 2, SLOPE * 2, AT_A),
    (A, 5, AT_A * 3, SLOPE * 3, 0),
    (A, -5, -AT_A, -SLOPE, 0),
    (-A, 0, -A / 4, 1 / 4 - np.log(3) * 3 / 16, -A / 4),
    (7, 1, AT_2 * 2, 0, AT_2),
    (7, 5, AT_2 * 3, 0, 0),
    (0, -1, 0, 0, 0),
]
