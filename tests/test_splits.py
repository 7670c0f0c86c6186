"""The split by customer: shares, and what it depends on."""

from __future__ import annotations

from collections import Counter

import pytest

from distil.splits import split_of


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_shares_of_the_split(seed):
    counts = Counter(split_of(f"CUS_{number}", seed) for number in range(20_000))
    assert counts["train"] / 20_000 == pytest.approx(0.6, abs=0.015)
    assert counts["calibration"] / 20_000 == pytest.approx(0.1, abs=0.01)
    assert counts["validation"] / 20_000 == pytest.approx(0.3, abs=0.015)


def test_the_split_depends_on_customer_and_split_seed_alone():
    names = [f"CUS_{number}" for number in range(500)]
    first = [split_of(name, 0) for name in names]
    assert first == [split_of(name) for name in names]
    assert sum(a != b for a, b in zip(first, (split_of(name, 1) for name in names), strict=True)) > 100
