"""Small files of a checkpoint that are damaged or hostile: read as transformers reads them, or an error with file and key."""

from pathlib import Path

import pytest
import side_files

from smolvlm_jax import resolve


@pytest.mark.parametrize("count", [60, pytest.param(2500, marks=pytest.mark.thorough)])
def test_only_our_errors_leave(count):
    tried, found = side_files.run(count, seed=count, source=Path(resolve("tiny")))
    assert tried == count and not found
