"""Questions of benchmarks, worded as the published scores were taken.

The scores of SmolVLM and granite-docling were taken with VLMEvalKit, whose wrappers of these models (vlmeval/vlm/smolvlm.py and
granite_docling.py) word the questions of some benchmarks anew and begin the answers of others with "Answer:". Here the same
is said as chat messages, which the checkpoint's chat template turns into the same prompts.
"""

import re
from ast import literal_eval as literal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ..errors import InputError

__all__ = ["TASKS", "Family", "Prompt", "kind_of", "published_prompt", "task_prompt"]

Family = Literal["smolvlm", "smolvlm2", "docling"]
"""Which wrapper of VLMEvalKit: of the first generation, of SmolVLM2, of granite-docling."""


class Prompt(NamedTuple):
    """A question as it is put to the model.

    Attributes:
        content: items of the user's turn.
        begin: how the assistant's turn begins; "" for a turn of the model's own.
    """

    content: list[dict[str, Any]]
    begin: str = ""


_CHARTQA = """For the question below, follow the following instructions:
-The answer should contain as few words as possible.
-Don't paraphrase or reformat the text you see in the image.
-Answer a binary question with Yes or No.
-When asked to give a numerical value, provide a number like 2 instead of Two.
-If the final answer has two or more items, provide it in the list format like [1, 2].
-When asked to give a ratio, give out the decimal value like 0.25 instead of 1:4.
-When asked to give a percentage, give out the whole value like 17 instead of decimal like 0.17%.
-Don't include any units in the answer.
-Do not include any full stops at the end of the answer.
-Try to include the full label from the graph when asked about an entity.
Question: """
_DOCVQA = (
    "Give a short and terse answer to the following question. Do not paraphrase or reformat the text you see in the image. "
    "Do not include any full stops. Just give the answer without additional explanation. Question: "
)
_TEXTVQA = """\
Answer the following question about the image using as few words as possible. Follow these additional instructions:
-Always answer a binary question with Yes or No.
-When asked what time it is, reply with the time seen in the image.
-Do not put any full stops at the end of the answer.
-Do not put quotation marks around the answer.
-An answer with one or two words is favorable.
-Do not apply common sense knowledge. The answer can be found in the image.
Question: """
_BEFORE = {"chartqa": _CHARTQA, "docvqa": _DOCVQA, "textvqa": _TEXTVQA}
_AFTER = {"brief": "\nGive a very brief answer.", "yes-or-no": "\nAnswer yes or no."}
_SELECT = "Please select the correct answer from the options above."
_WORDS: dict[str, dict[str, str]] = {
    "options": {"\nOptions:": "\nChoices:", _SELECT: "Answer with the letter."},
    "mmbench": {"\nOptions:": "\nChoices:", _SELECT: "Answer with a letter."},
    "mmmu": {"Question:": "", _SELECT: "Answer with the letter.", "\nOptions:": "\nChoices:"},
    "mathvista": {**{f"({x}) ": f"{x}. " for x in "ABCDEFGH"}, "\nOptions:": "\nChoices:", "Hint: ": ""},
}
_KINDS: dict[str, tuple[str, ...]] = {
    "mmmu": ("MMMU_DEV_VAL", "MMMU_TEST"),
    "mathvista": ("MathVista_MINI",),
    "chartqa": ("ChartQA_TEST",),
    "docvqa": ("DocVQA_VAL", "DocVQA_TEST"),
    "textvqa": ("TextVQA_VAL", "TextVQA_TEST"),
    "brief": ("MME", "MMVet", "OCRVQA_TEST", "OCRVQA_TESTCORE", "InfoVQA_VAL", "InfoVQA_TEST", "OCRBench"),
    "yes-or-no": ("HallusionBench",),
    "options": ("MMStar", "SEEDBench_IMG", "AI2D_TEST", "ScienceQA_VAL", "ScienceQA_TEST"),
}
# Where granite-docling's wrapper does otherwise than SmolVLM's.
_DOCLING = {
    **dict.fromkeys(("ChartQA_TEST", "ChartQAPro", "DocVQA_VAL", "DocVQA_TEST", "TextVQA_VAL"), "brief"),
    **dict.fromkeys(("TextVQA_TEST", "OCRBench", "CCBench"), "plain"),
}


def kind_of(dataset: str | None, family: Family = "smolvlm2") -> str:
    """How the questions of a dataset of VLMEvalKit are worded; "plain" for those that are put as they are."""
    name = dataset or ""
    if family == "docling" and name in _DOCLING:
        return _DOCLING[name]
    if re.fullmatch(r"MMBench(_(DEV|TEST)_(EN|CN)|_CN)?(_V11)?|CCBench", name):
        return "mmbench"
    return next((kind for kind, names in _KINDS.items() if name in names), "plain")


def published_prompt(message: Sequence[Mapping[str, Any]], dataset: str | None, family: Family = "smolvlm2") -> Prompt:
    """A question of VLMEvalKit as it is put to a published checkpoint.

    Args:
        message: items {"type": "text" or "image", "value"}, as a dataset of VLMEvalKit makes them.
        dataset: its name there.
        family: of the checkpoint.

    Raises:
        InputError: an item of another type.
    """
    kind, docling = kind_of(dataset, family), family == "docling"
    pictures = [item["value"] for item in message if item["type"] == "image"]
    if other := {item["type"] for item in message} - {"text", "image"}:
        raise InputError(f"{dataset}: a question has an item of the type {min(other)!r}; it may have text and image")
    words = _WORDS.get(kind, {})
    content: list[dict[str, Any]] = []
    if kind == "mmmu":  # all pictures first, then text that refers to them by number
        content += [] if docling else [_text("Question: ")]
        for number, picture in enumerate(pictures, 1):
            content += [_text(f"<image {number}>:"), _image(picture), _text("\n")]
    elif kind in ("mmbench", "mathvista", *_BEFORE) and not docling:
        content += map(_image, pictures)
    if kind in _BEFORE:  # the first generation's wrapper has another apostrophe
        content.append(_text(_BEFORE[kind].replace("'", "’") if family == "smolvlm" else _BEFORE[kind]))
    number, placed = 0, any(item["type"] == "image" for item in content)
    for item in message:
        if item["type"] == "text":
            content.append(_text(_worded(item["value"].strip(), words, kind)))
        elif kind == "mmmu":
            number += 1
            content.append(_text(f" <image {number}> "))
        elif not placed:
            content.append(_image(item["value"]))
    content += [_text(_AFTER[kind])] if kind in _AFTER else []
    asked = "".join(item.get("text", "") for item in content)
    lettered = kind in ("mmmu", "mathvista") and "A." in asked and "B." in asked
    if lettered and kind == "mathvista" and docling:
        content.append(_text("\nAnswer with the letter."))
    return Prompt(content, "Answer:" if lettered or kind in ("options", "mmbench") else "")


def _worded(text: str, words: Mapping[str, str], kind: str) -> str:
    for old, new in words.items():
        text = text.replace(old, new)
    if kind == "mmbench" and text.startswith("Hint:") and text.count("\nQuestion:") == 1 and text.count("\nChoices:") == 1:
        hint, question = text.split("\nQuestion:")
        question, choices = question.split("\nChoices:")
        text = f"Question:{question}\n{hint}\nChoices:{choices}"
    return text.strip() if kind in ("mmmu", "mathvista") else text


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(picture: Any) -> dict[str, Any]:
    return {"type": "image", "image": picture}


# ---- documents of lmms-eval as questions of VLMEvalKit


def _phrase(doc: Mapping[str, Any]) -> str:
    return f"{doc['question']}\nAnswer the question using a single word or phrase."


def _choices(doc: Mapping[str, Any]) -> str:
    options = doc["options"]
    if isinstance(options, str):  # MMMU holds a list as text
        options = literal(options)
    lines = "".join(f"{chr(ord('A') + n)}. {option}\n" for n, option in enumerate(options))
    return f"Question: {doc['question']}\n" + (f"Options:\n{lines}{_SELECT} \n" if options else "")


# Tasks of lmms-eval: the dataset of VLMEvalKit, and the text that it makes of a document.
TASKS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "chartqa": ("ChartQA_TEST", _phrase),
    "docvqa_val": ("DocVQA_VAL", _phrase),
    "docvqa_test": ("DocVQA_TEST", _phrase),
    "infovqa_val": ("InfoVQA_VAL", _phrase),
    "infovqa_test": ("InfoVQA_TEST", _phrase),
    "textvqa_val": ("TextVQA_VAL", _phrase),
    "textvqa_test": ("TextVQA_TEST", _phrase),
    "ocrbench": ("OCRBench", lambda doc: doc["question"]),
    "ai2d": ("AI2D_TEST", _choices),
    "mmmu_val": ("MMMU_DEV_VAL", _choices),
    "mmmu_test": ("MMMU_TEST", _choices),
    **dict.fromkeys(
        ("mathvista_testmini_cot", "mathvista_testmini_format", "mathvista_testmini_solution"),
        ("MathVista_MINI", lambda doc: doc["query"]),
    ),
}


def task_prompt(task: str, doc: Mapping[str, Any], family: Family = "smolvlm2") -> Prompt:
    """A document of a task of lmms-eval as it is put to a published checkpoint.

    Raises:
        InputError: the wording of this task is not known.
    """
    if task not in TASKS:
        raise InputError(f"there is no published prompt for the task {task!r}; there are for {', '.join(TASKS)}")
    dataset, worded = TASKS[task]
    text = worded(doc)
    pictures = [doc[name] for name in ("image", *(f"image_{n}" for n in range(1, 8))) if doc.get(name) is not None]
    if "decoded_image" in doc:  # MathVista's `image` is a name
        pictures = [doc["decoded_image"]]
    message = [{"type": "image", "value": picture} for picture in pictures] + [{"type": "text", "value": text}]
    if dataset.startswith("MMMU"):
        pieces = re.split(r"<image (\d)>", text)
        if len(pieces) > 1:
            message = [{"type": "text", "value": pieces[0]}]
            for number, piece in zip(pieces[1::2], pieces[2::2], strict=True):
                message += [{"type": "image", "value": doc[f"image_{number}"]}, {"type": "text", "value": piece}]
    return published_prompt(message, dataset, family)
