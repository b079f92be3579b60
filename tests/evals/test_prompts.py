"""Prompts of the published scores, as the checkpoint's chat template writes them."""

import pytest
from PIL import Image

from smolvlm_jax import SmolVLMProcessor, resolve
from smolvlm_jax.errors import InputError
from smolvlm_jax.evals.prompts import kind_of, published_prompt, task_prompt

PICTURE = Image.new("RGB", (8, 8))
CHOICES = "Hint: h\nQuestion: q?\nOptions:\nA. x\nB. y\nPlease select the correct answer from the options above. \n"


@pytest.fixture(scope="module")
def written():
    """The prompt as text."""
    processor = SmolVLMProcessor.from_pretrained(resolve("tiny"))

    def write(prompt) -> str:
        messages = [{"role": "user", "content": prompt.content}]
        if not prompt.begin:
            return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        messages.append({"role": "assistant", "content": prompt.begin})
        return processor.apply_chat_template(messages, continue_final_message=True, tokenize=False)

    return write


def question(text: str) -> list[dict]:
    return [{"type": "image", "value": PICTURE}, {"type": "text", "value": text}]


@pytest.mark.parametrize(
    ("dataset", "text", "expected"),
    [
        ("BLINK", " q? ", "User:<image>q?<end_of_utterance>\nAssistant:"),
        ("OCRBench", "q?", "User:<image>q?\nGive a very brief answer.<end_of_utterance>\nAssistant:"),
        ("HallusionBench", "q?", "User:<image>q?\nAnswer yes or no.<end_of_utterance>\nAssistant:"),
        (
            "AI2D_TEST",
            CHOICES,
            "User:<image>Hint: h\nQuestion: q?\nChoices:\nA. x\nB. y\nAnswer with the letter.<end_of_utterance>\n"
            "Assistant: Answer:",
        ),
        (
            "MMBench_DEV_EN",
            CHOICES,
            "User:<image>Question: q?\nHint: h\nChoices:\nA. x\nB. y\nAnswer with a letter.<end_of_utterance>\n"
            "Assistant: Answer:",
        ),
        (
            "MMMU_DEV_VAL",
            CHOICES,
            "User: Question: <image 1>:<image>\n <image 1> Hint: h\n q?\nChoices:\nA. x\nB. y\nAnswer with the letter."
            "<end_of_utterance>\nAssistant: Answer:",
        ),
        (
            "MathVista_MINI",
            "Hint: do.\nQuestion: q?\nChoices:\n(A) 1\n(B) 2",
            "User:<image>do.\nQuestion: q?\nChoices:\nA. 1\nB. 2<end_of_utterance>\nAssistant: Answer:",
        ),
        ("MathVista_MINI", "Hint: do.\nQuestion: q?", "User:<image>do.\nQuestion: q?<end_of_utterance>\nAssistant:"),
        (
            "DocVQA_VAL",
            "q?",
            "User:<image>Give a short and terse answer to the following question. Do not paraphrase or reformat the text you "
            "see in the image. Do not include any full stops. Just give the answer without additional explanation. Question: q?"
            "<end_of_utterance>\nAssistant:",
        ),
    ],
)
def test_a_question_is_put_as_the_published_scores_were_taken(written, dataset, text, expected):
    assert written(published_prompt(question(text), dataset)) == f"<|im_start|>{expected}"


def test_families_are_asked_as_their_wrappers_ask():
    chart = lambda family: published_prompt(question("q?"), "ChartQA_TEST", family).content
    assert (
        "-Don't include any units" in chart("smolvlm2")[1]["text"] and "-Don’t include any units" in chart("smolvlm")[1]["text"]
    )
    assert [item.get("text") for item in chart("docling")] == [None, "q?", "\nGive a very brief answer."]
    assert kind_of("OCRBench", "docling") == "plain"


def test_a_document_of_lmms_eval_is_the_question_of_vlmevalkit():
    doc = {"question": "Which? <image 1>", "options": "['x', 'y']", "image_1": PICTURE, "image_2": None}
    content, begin = task_prompt("mmmu_val", doc)
    assert [item.get("text", "<image>") for item in content] == [
        *("Question: ", "<image 1>:", "<image>", "\n", "Which?", " <image 1> "),
        "Options:\nA. x\nB. y\nAnswer with the letter.",  # no longer at the beginning of a line
    ]
    assert begin == "Answer:"
    asked = task_prompt("textvqa_val", {"question": "q?", "image": PICTURE}).content
    assert asked[-1]["text"] == "q?\nAnswer the question using a single word or phrase."
    with pytest.raises(InputError, match="no published prompt for the task 'mme'; there are for chartqa"):
        task_prompt("mme", {})
