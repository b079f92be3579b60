"""What messages have in common."""

import random
import shutil
from types import SimpleNamespace

import pytest

from smolvlm_jax.directories import check_free_space
from smolvlm_jax.errors import StorageError, size_text, sizes_apart


def test_two_sizes_in_one_message_are_told_apart():
    """However near to each other: the first one reads as the larger, and the difference is no zero."""
    chance = random.Random(0)
    for _ in range(300):
        there = chance.randrange(10 ** chance.randrange(1, 14))
        over = chance.randrange(1, 10 ** chance.randrange(1, 12))
        needed, has, difference = sizes_apart(there + over, there)
        number = lambda text: float(text.removesuffix(" GB").replace(",", ""))
        assert number(needed) > number(has), (needed, has)
        assert abs(number(needed) - (there + over) / 1e9) <= 0.006 and abs(number(has) - there / 1e9) <= 0.006
        assert abs(number(needed) - number(has) - over / 1e9) <= max(over / 1e9, 1e-9), "the difference is about what is shown"
        assert difference == size_text(over) and float(difference.split()[0].replace(",", "")) > 0
    assert sizes_apart(33_554_500_000, 33_554_432_000) == ("33.55450 GB", "33.55443 GB", "68.0 kB")
    assert [size_text(count) for count in (1, 20, 1500, 3_000_000, 1_250_000_000)] == [
        "1 byte", "20 bytes", "1.5 kB", "3.0 MB", "1.25 GB",
    ]  # fmt: skip


def test_a_full_disk_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=10**12, free=2_000_000_000))
    with pytest.raises(StorageError, match=r"needs 2\.0001 GB, and .* has 2\.0000 GB free$"):
        check_free_space(tmp_path, 2_000_100_000)
