"""What a source gives, unit by unit."""

import itertools

import pytest


def everything(source, shard_size: int) -> list[list]:
    """The records of every unit."""
    units = list(source.units(shard_size))
    assert [unit.index for unit in units] == list(range(len(units)))
    assert not units or sum(unit.share for unit in units) == pytest.approx(1)
    out = []
    for unit in source.units(shard_size):
        rows = list(unit.rows())
        assert all(a.position < b.position for a, b in itertools.pairwise(rows))
        assert all(row.position < shard_size for row in rows)
        out.append([source.parse(row.payload) for row in rows])
    return out
