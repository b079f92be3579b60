"""Exact match by generation on held-out conversations, and a page that shows some of them with their pictures."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..generation import generate
from ..io import write_text
from ..processing import SmolVLMProcessor
from ..processing.chat import collect_media, normalize_conversations
from ..processing.fetch import load_image
from .config import DataConfig, EvaluationConfig
from .records import messages_of, open_records

__all__ = ["Answer", "ask", "held_out", "write_page"]


@dataclass(frozen=True)
class Answer:
    """messages: the conversation up to the question. wanted, got: texts without surrounding space."""

    messages: list[dict[str, Any]]
    wanted: str
    got: str

    @property
    def right(self) -> bool:
        return self.wanted == self.got


def held_out(config: EvaluationConfig) -> list[tuple[list[dict[str, Any]], str]]:
    """(conversation up to the last assistant turn, that turn's text) of the first `config.samples` records.

    Raises InputError naming the first record that cannot be used: an evaluation that leaves some out measures something else.
    """
    records = open_records(config.path)
    out = []
    for index in range(min(config.samples, len(records))):
        record, folder, place = records[index]
        try:
            messages = messages_of(record, folder)
        except InputError as error:
            raise InputError(f"evaluation data, {place}: {error}") from error
        content = messages[-1]["content"]
        items = [content] if isinstance(content, str) else [item.get("text", "") for item in content]
        if len(messages) < 2:
            raise InputError(f"evaluation data, {place}: nothing is asked before the answer")
        out.append((messages[:-1], "".join(items).strip()))
    return out


def ask(model, params, processor: SmolVLMProcessor, tasks: Sequence, config: EvaluationConfig, data: DataConfig, mesh=None):
    """Answers to all tasks, greedy, `config.batch_size` at a time: a list of `Answer`."""
    answers: dict[int, Answer] = {}
    # Videos do not go into one call with pictures.
    moving = [bool(collect_media(normalize_conversations(messages)[0], "video")[0]) for messages, _ in tasks]
    batches = [
        group[start : start + config.batch_size]
        for group in ([n for n in range(len(tasks)) if moving[n] == kind] for kind in (False, True))
        for start in range(0, len(group), config.batch_size)
    ]
    for batch in batches:
        part = [tasks[number] for number in batch]
        inputs = processor.apply_chat_template(
            [messages for messages, _ in part],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            padding=True,
            padding_side="left",
            return_tensors="np",
            pixel_format="uint8",
            special_tokens_in_text=data.special_tokens_in_text,
            **dict(data.image_options),
        )
        rows = generate(model, params, **inputs, max_new_tokens=config.max_new_tokens, mesh=mesh)
        texts = processor.batch_decode(rows[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for number, (messages, wanted), text in zip(batch, part, texts, strict=True):
            answers[number] = Answer(messages, wanted, text.strip())
    return [answers[number] for number in range(len(tasks))]


def write_page(answers: Sequence[Answer], path: Path, title: str, show: int = 50) -> None:
    """A self-contained HTML page: wrong answers first, with their pictures made small. Written whole or not at all."""
    right = sum(answer.right for answer in answers)
    ordered = sorted(answers, key=lambda answer: answer.right)
    chosen = ordered[: -(-show // 2)] + [a for a in ordered[-(-show // 2) :] if a.right][: show // 2]
    rows = "\n".join(_row(answer) for answer in chosen)
    text = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #222 }}
table {{ border-collapse: collapse; width: 100% }}
td {{ border-top: 1px solid #ddd; padding: .5rem; vertical-align: top }}
img {{ max-width: 12rem; max-height: 12rem; margin-right: .3rem; image-rendering: auto }}
.right {{ color: #1a7f37 }} .wrong {{ color: #b42318 }}
</style>
<h1>{html.escape(title)}</h1>
<p>{right} of {len(answers)} answers are exact ({right / len(answers):.1%}). {len(chosen)} are shown, wrong ones first.</p>
<table>
{rows}
</table>
</html>
"""
    write_text(path, text)


def _row(answer: Answer) -> str:
    pictures, words = [], []
    for message in answer.messages:
        content = message["content"]
        words.append(f"<b>{html.escape(str(message['role']))}</b>")
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if item.get("type") == "text":
                words.append(html.escape(item["text"]))
            elif item.get("type") == "image":
                pictures.append(_thumbnail(item))
            else:
                words.append(f"[{html.escape(str(item.get('type')))}]")
    mark = "right" if answer.right else "wrong"
    got = f'<span class="{mark}">{html.escape(answer.got) or "(nothing)"}</span>'
    wanted = "" if answer.right else f"<br>wanted: {html.escape(answer.wanted)}"
    return f"<tr><td>{''.join(pictures)}</td><td>{' '.join(words)}</td><td>{got}{wanted}</td></tr>"


def _thumbnail(item: dict) -> str:
    picture = next((item[key] for key in ("image", "url", "path", "base64") if item.get(key) is not None), None)
    try:
        picture = load_image(picture) if not hasattr(picture, "convert") else picture
    except (InputError, OSError) as error:
        return f"<i>{html.escape(str(error))}</i>"
    small = picture.convert("RGB")
    small.thumbnail((240, 240))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
