"""Exact match by generation on held-out conversations, and a page that shows some of them with their pictures."""

import base64
import html
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ..errors import InputError
from ..generation import generate
from ..io import write_json, write_text
from ..model import SmolVLMForConditionalGeneration
from ..processing import SmolVLMProcessor
from ..processing.chat import collect_media, normalize_conversations
from ..processing.fetch import load_image
from ..sharding import make_mesh, parameter_shardings
from .config import DataConfig, EvaluationConfig
from .partition import Partition, join
from .processes import everyones, on_host
from .records import messages_of, open_records
from .state import TrainState

__all__ = ["Answer", "Evaluator", "Task", "ask", "held_out", "write_page"]

Task = tuple[list[dict[str, Any]], str]  # the conversation up to the question, and the wanted answer


@dataclass(frozen=True)
class Answer:
    """An answer that was generated.

    Attributes:
        messages: the conversation up to the question.
        wanted: the right answer, without surrounding space.
        got: the model's, without surrounding space.
    """

    messages: list[dict[str, Any]]
    wanted: str
    got: str

    @property
    def right(self) -> bool:
        return self.wanted == self.got


def held_out(config: EvaluationConfig) -> list[Task]:
    """(conversation up to the last assistant turn, that turn's text) of the first `config.samples` records.

    Raises:
        InputError: names the first record that cannot be used. None is left out: that would change what is measured.
    """
    records = open_records(config.path)
    out = []
    for index in range(min(config.samples, len(records))):
        element = records[index]
        place = element[-1]
        try:
            messages = messages_of(element)
        except InputError as error:
            raise InputError(f"evaluation data, {place}: {error}") from error
        content = messages[-1]["content"]
        items = [content] if isinstance(content, str) else [item.get("text", "") for item in content]
        if len(messages) < 2:
            raise InputError(f"evaluation data, {place}: nothing is asked before the answer")
        out.append((messages[:-1], "".join(items).strip()))
    return out


def ask(
    model: SmolVLMForConditionalGeneration,
    params: dict,
    processor: SmolVLMProcessor,
    tasks: Sequence[Task],
    config: EvaluationConfig,
    data: DataConfig,
    mesh: Mesh | None = None,
) -> list[Answer]:
    """Answers to all tasks, greedy, `config.batch_size` at a time."""
    answers: dict[int, Answer] = {}
    # The processor takes videos and pictures in separate calls.
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


class Evaluator:
    """Exact match of a state on held-out conversations; called by the loop.

    The processes of a job divide the questions: each answers its own on its own devices, with a whole copy of the weights.
    """

    def __init__(
        self,
        model: SmolVLMForConditionalGeneration,
        partition: Partition,
        *,
        base: dict,
        processor: SmolVLMProcessor,
        tasks: Sequence[Task],
        directory: Path,
        mesh: Mesh,
    ):
        self._model, self._partition, self._base = model.clone(remat="none", scan_layers=False), partition, base
        self._processor, self._tasks, self._directory = processor, tasks, directory
        assert partition.config.evaluation is not None  # the run has none to call otherwise
        self._config = partition.config.evaluation
        if jax.process_count() > 1:
            mesh = make_mesh(1, -1, 1, jax.local_devices())
        self._mesh = mesh if mesh.size > 1 else None

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        """Answer the questions, and write samples.html and evaluation.json.

        Returns:
            exact_match, the share of exact answers, and evaluation_s, seconds.
        """
        started = time.perf_counter()
        tasks = self._tasks
        params = self._partition.combine(self._base, state.params)
        count = jax.process_count()
        if count > 1:
            params = on_host(params)
            if self._mesh is not None:
                axes = join(self._partition.base_axes, self._partition.axes)
                params = jax.device_put(params, parameter_shardings(params, axes, self._mesh))
            tasks = tasks[jax.process_index() :: count]
        own = ask(self._model, params, self._processor, tasks, self._config, self._partition.config.data, self._mesh)
        texts = everyones([answer.got for answer in own])
        got = [texts[i % count][i // count] for i in range(len(self._tasks))]
        answers = [Answer(messages, wanted, text) for (messages, wanted), text in zip(self._tasks, got, strict=True)]
        share = sum(answer.right for answer in answers) / len(answers)
        if jax.process_index() == 0:
            self._write(answers, share, step)
        return {"exact_match": share, "evaluation_s": time.perf_counter() - started}

    def _write(self, answers: list[Answer], share: float, step: int) -> None:
        title = f"{Path(self._config.path).name} at step {step}"
        write_page(answers, self._directory / "samples.html", title, self._config.show)
        rows = [{"wanted": answer.wanted, "got": answer.got} for answer in answers]
        write_json(self._directory / "evaluation.json", {"step": step, "exact_match": share, "answers": rows})


def write_page(answers: Sequence[Answer], path: Path, title: str, show: int = 50) -> None:
    """Write a self-contained HTML page of at most `show` answers with small pictures, wrong answers first."""
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
    picture: Any = next((item[key] for key in ("image", "url", "path", "base64") if item.get(key) is not None), None)
    try:
        picture = load_image(picture) if not hasattr(picture, "convert") else picture
    except (InputError, OSError) as error:
        return f"<i>{html.escape(str(error))}</i>"
    small = picture.convert("RGB")
    small.thumbnail((240, 240))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
