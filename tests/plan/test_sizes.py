"""The table of docs/plan.md: consistent with itself and the sizes, and as benchmarks/sizes.py prints it."""

import importlib.util
import json
from pathlib import Path

import pytest

from smolvlm_jax.plan import CHIPS
from smolvlm_jax.plan.settings import SHORT_NAMES
from smolvlm_jax.sizes import published_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
COLUMNS = 2048


def script():
    spec = importlib.util.spec_from_file_location("sizes_benchmark", ROOT / "benchmarks" / "sizes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sizes = script()


def rows() -> list[dict[str, str]]:
    """The table as dictionaries."""
    _, found, rest = PAGE.partition(sizes.HEADER)
    assert found, "docs/plan.md has the table of benchmarks/sizes.py"
    cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
    lines = rest.split("\n")[2:]
    end = next(n for n, line in enumerate(lines) if not line.startswith("|"))
    return [dict(zip(cells(sizes.HEADER), cells(line), strict=True)) for line in lines[:end]]


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['model']} {row['chip']} {row['slots']}")
def test_a_row_adds_up_and_fits(row):
    parts = [float(row[name]) for name in ("weights", "KV cache", "temporaries", "other")]
    total, usable = float(row["all"]), float(row["usable"])
    assert sum(parts) == pytest.approx(total, abs=0.021), "four rounded numbers and a fifth"
    assert total <= usable == round(CHIPS[row["chip"]].usable / 1e9, 2)
    config = published_config(SHORT_NAMES[row["model"].lower()])
    text, slots = config.text_config, int(row["slots"].partition(":")[0].replace(",", ""))
    width = 1 if "int8" in row["slots"] else 2
    cache = slots * COLUMNS * text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_dim * width / 1e9
    assert 0.99 * cache <= parts[1] <= 1.15 * cache, "the columns, with what the layout and the scales of int8 add"
    low, _, high = row["records/s"].partition("–")
    assert row["records/s"].startswith("up to") or 0 < float(low) < float(high)
    assert float(row["compiled, s"]) > 0


def test_three_sizes_on_six_chips():
    found = [(row["model"].lower(), row["chip"]) for row in rows() if "most" not in row["slots"]]
    chips = ("v5e", "v6e", "v5p", "a100", "h100", "b200")
    assert sorted(found) == sorted((model, chip) for model in ("256m", "500m", "2.2b") for chip in chips)


def test_the_largest_engines_of_the_2b_on_one_v5e_chip():
    most = {row["slots"].partition(": ")[2]: int(row["slots"].partition(":")[0]) for row in rows() if "most" in row["slots"]}
    assert most["the most"] >= 16 and most["the most, int8 caches"] >= 32


def test_the_table_is_printed_from_kept_plans(tmp_path):
    plan = {
        "memory": {
            "kinds": {"weights": 52 * 10**7, "KV cache": 3 * 10**9, "features": 10**7, "temporaries": 2 * 10**8, "code": 10**7},
            "total": 374 * 10**7,
            "usable": 16 * 10**9,
        },
        "rate": {"low": 1.234, "high": 20.4},
        "shapes": {"slots": [64]},
        "seconds": 61.4,
    }
    for row in (sizes.ROWS[0], sizes.ROWS[-1]):
        row.file(tmp_path).write_text(json.dumps(plan))
    table = sizes.table(tmp_path)
    assert table.split("\n")[2:] == [
        "| 256M | v5e | 64 | 0.52 | 3.00 | 0.20 | 0.02 | 3.74 | 16.00 | 1.23–20.4 | 61 |",
        "| 2.2B | v5e | 64: the most, int8 caches | 0.52 | 3.00 | 0.20 | 0.02 | 3.74 | 16.00 | 1.23–20.4 | 61 |",
    ]
    page = sizes.replace_table(PAGE, table)
    assert table in page and sizes.replace_table(page, table) == page
    assert page.startswith(PAGE.partition(sizes.HEADER)[0]) and page.endswith(PAGE.partition("The clock of tpu7x")[2])
