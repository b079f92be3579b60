"""The bundled checkpoint learns a second skill from its recipe and keeps the first."""

import subprocess
import sys
import time

import handwritten_numbers
import pytest
from train_helpers import ROOT, environment

from smolvlm_jax import SmolVLMProcessor, load, resolve
from smolvlm_jax.train.config import DataConfig, EvaluationConfig
from smolvlm_jax.train.evaluate import ask, held_out
from smolvlm_jax.train.metrics import read_metrics

pytestmark = pytest.mark.slow


def test_adapters_teach_a_second_skill(tmp_path):
    pytest.importorskip("skimage", reason="the photographs come with scikit-image (test extra)")
    for words in ([str(ROOT / "examples" / "photographs.py")], ["-m", "smolvlm_jax", "train", "photographs"]):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=7200
        )
        assert done.returncode == 0, done.stderr
        print(f"{' '.join(words)}: {(time.perf_counter() - started) / 60:.1f} minutes")
    config = EvaluationConfig(str(tmp_path / "data" / "photographs" / "held_out.jsonl"), samples=504, max_new_tokens=16)
    model, params = load("tiny")
    before = ask(model, params, SmolVLMProcessor.from_pretrained(resolve("tiny")), held_out(config), config, DataConfig())
    knew = sum(answer.right for answer in before) / len(before)
    run = tmp_path / "runs" / "photographs"
    knows = read_metrics(run)[-1]["exact_match"]
    first, kept = (handwritten_numbers.evaluate(str(name)) for name in ("tiny", run / "model"))
    print(f"pieces named: {knew:.1%} before, {knows:.1%} after; first skill before {first}, after {kept}")
    assert knew <= 0.2 and knows >= 0.9
    for skill in ("readings", "comparisons"):
        assert kept[skill] >= first[skill] - 0.02, skill
