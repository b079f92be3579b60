"""Which values of a parametrised test belong to the first tier; CONTRIBUTING.md describes the tiers."""

import pytest


def fast_first(count: int, values):
    """Values for one argument of `pytest.mark.parametrize`: all after the first `count` are left to the thorough tests."""
    return [pytest.param(v, marks=pytest.mark.thorough) if n >= count else v for n, v in enumerate(values)]
