"""The models for lmms-eval, called as it calls them; test_lmms_eval.py runs lmms-eval itself."""

import pytest
from harness_double import Instance
from PIL import Image

from smolvlm_jax.errors import InputError

SETTINGS = {"max_new_tokens": 20, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
pytestmark = pytest.mark.thorough


@pytest.fixture
def models(harnesses):
    from smolvlm_jax.evals import lmms

    return lmms


@pytest.fixture
def read(numbers):
    return lambda doc: Image.open(numbers / doc["image"])


def place(number: int) -> tuple:
    return (number, "numbers", "test")


def test_answers_of_the_chat_form_are_a_batch_jobs(models, documents, batch_answers, read):
    model = models.ChatSmolVLM(pretrained="tiny", workers=1, batch_size=1, max_batch_size=None, device=None)
    model.task_dict["numbers"] = {"test": documents}
    ask = lambda doc: [
        {"role": "user", "content": [{"type": "image", "url": read(doc)}, {"type": "text", "text": doc["prompt"]}]}
    ]
    asked = [Instance(("", ask, SETTINGS, *place(n))) for n in range(len(documents))]
    answers = model.generate_until(asked)
    assert [answer.text for answer in answers] == [batch_answers[doc["id"]] for doc in documents]
    assert all(answer.token_counts.output_tokens for answer in answers)

    def rounds(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return ask(doc)
        return ask(doc), round_idx > int(doc["answer"]) % 3, previous_output, None  # documents end after different rounds

    several = model.generate_until_multi_round([Instance(("", rounds, SETTINGS, *place(n))) for n in range(9)])
    assert several == [[batch_answers[doc["id"]]] * (1 + int(doc["answer"]) % 3) for doc in documents[:9]]


def test_the_simple_form_answers_alike_and_compares_probabilities(models, documents, batch_answers, read, capsys):
    model = models.SimpleSmolVLM(pretrained="tiny", workers=0)
    model.task_dict["numbers"] = {"test": [*documents[:8], {"image": "absent.png", "prompt": "?"}]}
    visual = lambda doc: [read(doc)] if doc["prompt"] != "?" else [b"no picture"]
    asked = [Instance((doc["prompt"], SETTINGS, visual, *place(n))) for n, doc in enumerate(model.task_dict["numbers"]["test"])]
    answers = [answer.text for answer in model.generate_until(asked)]
    assert answers == [*(batch_answers[doc["id"]] for doc in documents[:8]), ""]
    assert "question 8 of 9 counts as an empty answer" in capsys.readouterr().err

    choices = [(n, choice) for n in range(4) for choice in documents[n]["choices"]]
    scores = model.loglikelihood([Instance((documents[n]["prompt"], f" {text}", visual, *place(n))) for n, text in choices])
    losses = {(n, text): score.text for (n, text), score in zip(choices, scores, strict=True)}
    for n in range(4):
        best = min(documents[n]["choices"], key=lambda text: losses[n, text][0])
        assert best == batch_answers[documents[n]["id"]] and losses[n, best][1]
    (sum_of_logs,) = model.loglikelihood([Instance((documents[1]["prompt"], lambda doc: doc["answer"], visual, *place(1)))])
    loss = losses[1, documents[1]["answer"]][0]
    tokens = len(model._answerer.engine.processor.tokenizer.encode(f" {documents[1]['answer']}"))
    assert sum_of_logs.text[0] == pytest.approx(-loss * tokens, rel=1e-5)
    with pytest.raises(InputError, match="leave out --force_simple"):
        model.generate_until_multi_round([])


def test_what_lmms_eval_says_is_used_or_refused(models, monkeypatch):
    for given, words in (
        ({}, "no checkpoint is named"),
        ({"device": "cuda"}, "JAX_PLATFORMS"),
        ({"prompts": "mine"}, "task or published"),
        ({"x": 1}, "'x'"),
    ):
        with pytest.raises(InputError, match=words):
            models.ChatSmolVLM(**given)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without accelerate launch"):
        models.ChatSmolVLM()


def test_the_manifest_names_both_forms(models):
    from smolvlm_jax.evals.manifests import manifest

    found = manifest()
    assert found.model_id == "smolvlm_jax"
    for path, simple in ((found.chat_class_path, False), (found.simple_class_path, True)):
        assert getattr(models, path.rsplit(".", 1)[1]).is_simple is simple
