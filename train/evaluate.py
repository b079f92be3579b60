"""Exact match by generation on held-out conversations, and a page that shows some of them with their pictures."""

import base64
import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ..errors import InputError, MediaError, SmolVLMError
from ..generation import generate
from ..io import render_page, write_json, write_text
from ..model import SmolVLMForConditionalGeneration
from ..processing import BatchFeature, SmolVLMProcessor
from ..processing.bounds import check_length, least_tokens
from ..processing.chat import Message, collect_media, has_video, items_of, normalize_conversations
from ..processing.fetch import is_path, is_url, load_image
from ..processing.limits import describe_source
from ..processing.options import call_options
from ..sharding import make_mesh, parameter_shardings
from .config import DataConfig, DataSource, EvaluationConfig
from .partition import Partition, join
from .processes import everyones, on_host
from .records import messages_of, open_records
from .state import TrainState

__all__ = ["Answer", "Evaluator", "Task", "ask", "check_tasks", "held_out", "write_page"]

Task = tuple[list[dict[str, Any]], str]  # the conversation up to the question, and the wanted answer


@dataclass(frozen=True)
class Answer:
    """An answer that was generated.

    Attributes:
        messages: the conversation up to the question.
        wanted: the right answer, without surrounding space.
        got: the model's, without surrounding space.
        error: why the question could not be asked, which makes the answer a wrong one.
    """

    messages: list[dict[str, Any]]
    wanted: str
    got: str
    error: str | None = None

    @property
    def right(self) -> bool:
        return self.error is None and self.wanted == self.got


def held_out(config: EvaluationConfig) -> list[Task]:
    """(conversation up to the last assistant turn, that turn's text) of the first `config.samples` records.

    Raises:
        InputError: names the first record that cannot be used. None is left out: that would change what is measured.
    """
    source = DataSource(config.path, columns=config.columns)
    if config.split is not None:
        source = replace(source, split=config.split)
    try:
        records = open_records(source, ("validation", "test") if config.split is None else ())
    except InputError as error:
        raise InputError(f"evaluation.path: {error}") from error
    out = []
    for index in range(min(config.samples, len(records))):
        element = records[index]
        place = element[-1]
        try:
            messages = messages_of(element)
            answer = normalize_conversations(messages[-1:]).messages[0]
        except InputError as error:
            raise InputError(f"evaluation data, {place}: {error}") from error
        if len(messages) < 2:
            raise InputError(f"evaluation data, {place}: nothing is asked before the answer")
        out.append((messages[:-1], "".join(item["text"] for item in items_of(answer, "text")).strip()))
    return out


def check_tasks(tasks: Sequence[Task], processor: SmolVLMProcessor, data: DataConfig, longest: int) -> list[str]:
    """What is wrong with questions that cannot be asked, from the headers of their pictures; each is answered wrongly then.

    longest: tokens of a question, at most.
    """
    told = []
    for number, (messages, _) in enumerate(tasks):
        normal = normalize_conversations(messages).messages
        try:
            if has_video(normal):
                for video in collect_media(normal, "video")[0]:
                    if is_path(video) and not is_url(video) and not os.path.exists(video):
                        raise MediaError(f"no video at {describe_source(video)}")
                continue
            check_length(processor, messages, longest)
            options: dict[str, Any] = {"special_tokens_in_text": data.special_tokens_in_text, "add_generation_prompt": True}
            if (length := processor.count_prompt_tokens(messages, **options)[0]) > longest:
                raise InputError(f"it takes {length} tokens, and there is room for {longest}")
        except (SmolVLMError, OSError) as error:
            told.append(f"question {number + 1}: {error}")
    return told


def ask(
    model: SmolVLMForConditionalGeneration,
    params: dict,
    processor: SmolVLMProcessor,
    tasks: Sequence[Task],
    config: EvaluationConfig,
    data: DataConfig,
    mesh: Mesh | None = None,
) -> list[Answer]:
    """Answers to all tasks, greedy, `config.batch_size` at a time. What cannot be asked has its error in place of an answer."""
    answers: dict[int, Answer] = {}
    longest = model.config.text_config.max_position_embeddings - config.max_new_tokens

    def encode(numbers: Sequence[int]) -> BatchFeature:
        conversations = [tasks[number][0] for number in numbers]
        for conversation in conversations:
            if (least := least_tokens(processor, conversation)) > longest:
                raise InputError(f"the question takes at least {least} tokens, and there is room for {longest}")
        special, call = data.special_tokens_in_text, call_options(data.pictures)
        inputs = processor.encode_chat(conversations, padding=True, padding_side="left", special_tokens_in_text=special, **call)
        if (length := inputs["input_ids"].shape[1]) > longest:
            raise InputError(f"the question takes {length} tokens, and there is room for {longest}")
        return inputs

    # The processor takes videos and pictures in separate calls.
    moving = [has_video(normalize_conversations(messages).messages) for messages, _ in tasks]
    groups = [[number for number in range(len(tasks)) if moving[number] == kind] for kind in (False, True)]
    size = config.batch_size
    for batch in (group[start : start + size] for group in groups for start in range(0, len(group), size)):
        try:
            inputs = encode(batch)
        except (SmolVLMError, OSError):
            for number in list(batch):
                try:
                    encode([number])
                except (SmolVLMError, OSError) as error:
                    answers[number] = Answer(*tasks[number], "", str(error))
                    batch.remove(number)
            if not batch:
                continue
            inputs = encode(batch)
        rows = generate(model, params, **inputs, max_new_tokens=config.max_new_tokens, mesh=mesh)
        texts = processor.batch_decode(rows[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for number, text in zip(batch, texts, strict=True):
            answers[number] = Answer(*tasks[number], text.strip())
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
        found = everyones([[answer.got, answer.error] for answer in own])
        answers = [Answer(*task, *found[i % count][i // count]) for i, task in enumerate(self._tasks)]
        share = sum(answer.right for answer in answers) / len(answers)
        if jax.process_index() == 0:
            self._write(answers, share, step)
        return {"exact_match": share, "evaluation_s": time.perf_counter() - started}

    def _write(self, answers: list[Answer], share: float, step: int) -> None:
        title = f"{Path(self._config.path).name} at step {step}"
        write_page(answers, self._directory / "samples.html", title, self._config.show)
        error = lambda answer: {} if answer.error is None else {"error": answer.error}
        rows = [{"wanted": answer.wanted, "got": answer.got, **error(answer)} for answer in answers]
        write_json(self._directory / "evaluation.json", {"step": step, "exact_match": share, "answers": rows})


def write_page(answers: Sequence[Answer], path: Path, title: str, show: int = 50) -> None:
    """Write a self-contained HTML page of at most `show` answers with small pictures, wrong answers first."""
    right = [answer for answer in answers if answer.right]
    wrong = [answer for answer in answers if not answer.right]
    ordered, half = [*wrong, *right], -(-show // 2)
    rows = [_row(answer) for answer in [*ordered[:half], *[a for a in ordered[half:] if a.right][: show // 2]]]
    values = {"title": title, "right": len(right), "count": len(answers), "rows": rows}
    page = render_page(Path(__file__).with_name("samples.html"), **values)
    write_text(path, page.encode(errors="backslashreplace"))  # a record may hold half a surrogate pair


def _row(answer: Answer) -> dict[str, Any]:
    messages = normalize_conversations(answer.messages).messages[0]
    pictures = [_thumbnail(picture) for picture in collect_media([messages], "image")[0]]
    turns = [(message["role"], _words(message)) for message in messages]
    return {"answer": answer, "pictures": pictures, "turns": turns}


def _words(message: Message) -> str:
    """The words of a message; other items than words and pictures, by their names."""
    items = [item for item in message.get("content") or () if item["type"] != "image"]
    return " ".join(item["text"] if item["type"] == "text" else f"[{item['type']}]" for item in items)


def _thumbnail(picture: Any) -> tuple[str, str]:
    """(a small PNG in base64, ""), or ("", why the picture cannot be shown)."""
    try:
        small = (picture if hasattr(picture, "convert") else load_image(picture)).convert("RGB")
    except (InputError, OSError) as error:
        return "", str(error)
    small.thumbnail((240, 240))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode(), ""
