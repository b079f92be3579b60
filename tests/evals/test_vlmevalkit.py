"""The model for VLMEvalKit, called as its inference_api does: from many threads."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.thorough


def test_questions_of_many_threads_are_answered_as_by_a_batch_job(harnesses, numbers, documents, batch_answers, capsys):
    from smolvlm_jax.evals.vlmevalkit import SmolVLMJax

    model = SmolVLMJax(model_path="tiny", max_new_tokens=20)
    assert model.is_api and model.INTERLEAVE
    picture = lambda doc: {"type": "image", "value": str(numbers / doc["image"])}
    ask = lambda doc: model.generate(message=[picture(doc), {"type": "text", "value": doc["prompt"]}], dataset="Numbers")
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, documents))
    assert answers == [batch_answers[doc["id"]].strip() for doc in documents]
    turns = [{"role": "user", "content": [picture(documents[0]), {"type": "text", "value": documents[0]["prompt"]}]}]
    assert model.chat_inner(turns) == answers[0]
    failed = model.generate([{"type": "image", "value": "absent.png"}, {"type": "text", "value": "?"}])
    assert failed.startswith("Failed to obtain answer via API. ") and "a question has no answer" in capsys.readouterr().err


def test_its_run_py_is_started_with_the_model(harnesses, tmp_path, monkeypatch):
    from smolvlm_jax.evals import vlmevalkit

    (tmp_path / "run.py").write_text(
        "import sys\nfrom vlmeval.config import supported_VLM\n"
        "made = supported_VLM['smolvlm_jax']\nopen('said', 'w').write(f'{sys.argv[1:]} {sorted(made.keywords.items())}')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert vlmevalkit.main([str(tmp_path), "--pretrained", "tiny", "--data", "MMMU_DEV_VAL"]) == 0
    said = (tmp_path / "said").read_text()
    assert said == "['--model', 'smolvlm_jax', '--data', 'MMMU_DEV_VAL'] [('model_path', 'tiny'), ('prompts', 'published')]"
    assert vlmevalkit.main([str(tmp_path / "absent"), "--pretrained", "tiny"]) == 2
