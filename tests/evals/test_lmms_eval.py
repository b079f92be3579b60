"""lmms-eval itself with the bundled checkpoint. .ci/run has an environment with it; elsewhere this is skipped."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"), reason="lmms_eval is not installed: .ci/run installs it"),
]


def evaluate(numbers, out, tasks: str, *options: str) -> dict[str, list[dict]]:
    """The samples of each task, as lmms-eval logs them."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "smolvlm_jax", "--model_args", "pretrained=tiny,workers=1"]
    command += [
        "--include_path",
        str(numbers),
        "--tasks",
        tasks,
        "--batch_size",
        "1",
        "--log_samples",
        "--output_path",
        str(out),
    ]
    environment = {**os.environ, "HF_HOME": str(out / "home"), "HF_HUB_OFFLINE": "1", "XLA_FLAGS": ""}
    run = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = {}
    for name in tasks.split(","):
        (file,) = out.glob(f"tiny/*_samples_{name}.jsonl")
        found[name] = [json.loads(line) for line in file.read_text().splitlines()]
        (results,) = out.glob("tiny/*_results.json")
        found[f"{name} score"] = json.loads(results.read_text())["results"][name]
    return found


def test_scores_are_a_batch_jobs(numbers, documents, batch_answers, tmp_path):
    found = evaluate(numbers, tmp_path, "numbers,numbers_twice")
    ours = [batch_answers[doc["id"]] for doc in documents]
    right = sum(answer == doc["answer"] for answer, doc in zip(ours, documents, strict=True)) / len(documents)
    for name, answer_of in (("numbers", lambda text: text), ("numbers_twice", lambda texts: texts[-1])):
        said = {sample["doc_id"]: answer_of(sample["filtered_resps"]) for sample in found[name]}
        assert [said[n] for n in range(len(documents))] == ours
        assert found[f"{name} score"]["exact_match,none"] == pytest.approx(right, abs=1e-12)
    assert right > 0.9


def test_the_choice_with_the_smallest_loss_is_the_models(numbers, documents, batch_answers, tmp_path):
    found = evaluate(numbers, tmp_path, "numbers_choices", "--force_simple")
    among = [n for n, doc in enumerate(documents) if batch_answers[doc["id"]] in doc["choices"]]
    assert len(among) > 12
    for sample in (sample for sample in found["numbers_choices"] if sample["doc_id"] in among):
        doc = documents[sample["doc_id"]]
        losses = [float(loss) for loss, _ in sample["filtered_resps"]]
        assert doc["choices"][losses.index(min(losses))] == batch_answers[doc["id"]]
