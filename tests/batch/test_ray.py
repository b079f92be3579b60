"""Ray Data: the two callables alone, and the example on a local Ray that believes it has a TPU."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smolvlm_jax.batch.ray import PREPARED, SmolVLMPredictor, SmolVLMPreprocessor
from smolvlm_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = {"number.png": "4207", "first.png": "358", "second.png": "1946", "seven.png": "7", "ninety.png": "90"}
QUESTION = "What number is written here?"


def table(names) -> dict[str, np.ndarray]:
    files = [(ROOT / "examples" / name).read_bytes() if name in ANSWERS else b"no picture" for name in names]
    return {"id": np.array(names), "jpg": np.array(files, object), "label": np.arange(len(names))}


@pytest.mark.thorough
def test_rows_to_answers_with_and_without_separate_preprocessing():
    options = {"prompt": QUESTION, "columns": {"image": "jpg"}, "max_new_tokens": 20}
    names = [*ANSWERS, "damaged"]
    predictor = SmolVLMPredictor("tiny", engine={"ring_lengths": (256,), "slots": (8,)}, **options)
    prepared = SmolVLMPreprocessor("tiny", **options)(table(names))
    assert set(prepared) == {"id", "label", PREPARED}
    for out in (predictor(prepared), predictor(table(names))):
        assert list(out["text"]) == [*ANSWERS.values(), None] and list(out["id"]) == names
        assert out["error"][:-1].tolist() == [None] * 5 and "no picture" in out["error"][-1]
        assert out["finish_reason"].tolist() == ["stop"] * 5 + ["error"]
        assert set(out) == {
            "id", "label", "text", "error", "finish_reason", "prompt_tokens", "new_tokens", "tiles", "seconds",
        }  # fmt: skip


def test_rows_with_messages_and_their_own_sampling():
    messages = json.dumps([{"role": "user", "content": "12 and 7: which number is larger?"}])
    batch = {
        "messages": np.array([messages] * 3, object),
        "max_new_tokens": np.array([20, 3, None], object),
        "temperature": np.array([np.nan, np.nan, -1.0]),
    }
    out = SmolVLMPredictor("tiny", engine={"ring_lengths": (256,), "slots": (8,)}, max_new_tokens=20)(batch)
    assert out["text"][0] == "12 and 7. The first." and out["new_tokens"][1] == 3 and "temperature" in out["error"][2]


def test_columns_of_the_answers_are_not_replaced():
    with pytest.raises(InputError, match="'text'"):
        SmolVLMPreprocessor("tiny")({"prompt": np.array(["Hm?"]), "text": np.array(["mine"])})


@pytest.mark.thorough
def test_the_example_on_a_local_ray_with_a_simulated_tpu(tmp_path):
    for name in ("ray", "pyarrow"):
        pytest.importorskip(name, reason="needs Ray and pyarrow: pip install 'smolvlm-jax[ray]'")
    import pyarrow as pa
    import pyarrow.parquet

    names = [*ANSWERS, "damaged"] * 4
    columns = table(names)
    rows = pa.table({"id": list(columns["id"]), "image": list(columns["jpg"]), "label": columns["label"]})
    pyarrow.parquet.write_table(rows, tmp_path / "in.parquet")
    code = """
import sys
import ray
ray.init(num_cpus=3, resources={"TPU": 4}, include_dashboard=False, log_to_driver=True, configure_logging=False)
sys.path.insert(0, "examples")
import ray_batch
ray_batch.main(sys.argv[1:])
"""
    flags = ["--prompt", QUESTION, "--max-new-tokens", "20", "--resource", "TPU", "--amount", "4", "--workers", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "in.parquet"), str(tmp_path / "out"), *flags],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = pyarrow.parquet.read_table(tmp_path / "out").to_pylist()
    assert sorted((row["label"], row["text"]) for row in found if row["text"]) == [
        (number, ANSWERS[name]) for number, name in enumerate(names) if name in ANSWERS
    ]
    assert sum("no picture" in (row["error"] or "") for row in found) == 4 and len(found) == 24


def test_ids_of_tables_with_types_are_their_text():
    moments = np.array(["2023-11-14T22:13:20.000000001"], "datetime64[ns]")
    made = SmolVLMPreprocessor("tiny")
    for ids, want in ((moments, "2023-11-14 22:13:20.000000001"), (np.array([7.0, np.nan])[:1], 7)):
        (data,) = made({"id": ids, "prompt": np.array(["a"], object)})["smolvlm_prepared"]
        assert pickle.loads(data).id == want
