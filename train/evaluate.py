"""Held-out conversations: the loss on them, answers to them and their exact match, and a page that shows some of them."""

import base64
import io
import os
import time
from collections.abc import Callable, Sequence
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
from ..processing.limits import MediaLimits, describe_source
from ..processing.options import call_options
from ..processing.pdf_pages import with_pages
from ..sharding import make_mesh, parameter_shardings
from .config import DataConfig, DataSource, EvaluationConfig
from .held_out import HeldOutLoss
from .partition import Partition, join
from .processes import everyones, on_host
from .progress import Display
from .records import Records, messages_of, open_records
from .state import TrainState

__all__ = ["Answer", "Evaluator", "Task", "ask", "check_tasks", "has_free_text", "held_out", "held_out_records", "write_page"]

_SHORT = 8  # words of an answer that can be compared as a whole
_SHOWN = 10

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


def held_out_records(config: EvaluationConfig) -> Records:
    """The held-out records. Raises InputError."""
    source = DataSource(config.path, columns=config.columns)
    if config.split is not None:
        source = replace(source, split=config.split)
    try:
        return open_records(source, ("validation", "test") if config.split is None else ())
    except InputError as error:
        raise InputError(f"evaluation.path: {error}") from error


def held_out(config: EvaluationConfig, records: Records | None = None, limits: MediaLimits | None = None) -> list[Task]:
    """(conversation up to the last assistant turn, that turn's text) of the first `config.samples` records.

    Args:
        config: of the evaluation.
        records: what `held_out_records` returned, if it has been called.
        limits: of what may be read; of PDF files the pages are counted here.

    Raises:
        InputError: names the first record that cannot be used. None is left out: that would change what is measured.
    """
    records = held_out_records(config) if records is None else records
    out, then = [], "correct it, or take it out of the file: a run leaves none out, which would change what is measured"
    for index in range(min(config.samples, len(records))):
        element = records[index]
        place = element[-1]
        try:
            messages = with_pages(messages_of(element), limits or MediaLimits())
            answer = normalize_conversations(messages[-1:]).messages[0]
        except InputError as error:
            raise InputError(f"evaluation data, {place}: {error}; {then}") from error
        if len(messages) < 2:
            raise InputError(f"evaluation data, {place}: nothing is asked before the answer; {then}")
        out.append((messages[:-1], "".join(item["text"] for item in items_of(answer, "text")).strip()))
    return out


def has_free_text(tasks: Sequence[Task]) -> bool:
    """Whether most of the wanted answers have more words than one would expect to be met to the letter."""
    return 2 * sum(len(wanted.split()) > _SHORT for _, wanted in tasks) > len(tasks)


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
    *,
    kv_cache_dtype: str | None = None,
    going_on: Callable[[int], bool] = lambda count: True,
) -> list[Answer] | None:
    """Answers to all tasks, greedy, `config.batch_size` at a time. What cannot be asked has its error in place of an answer.

    Args:
        model: the model.
        params: its parameters.
        processor: its processor.
        tasks: what to ask.
        config: of the evaluation.
        data: how conversations are read.
        mesh: where.
        kv_cache_dtype: as in `generate`.
        going_on: called with the number of answers before each batch; False gives up.

    Returns:
        None if it gave up.
    """
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
        if not going_on(len(answers)):
            return None
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
        new = config.max_new_tokens
        rows = generate(model, params, **inputs, max_new_tokens=new, kv_cache_dtype=kv_cache_dtype, mesh=mesh)
        texts = processor.batch_decode(rows[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for number, text in zip(batch, texts, strict=True):
            answers[number] = Answer(*tasks[number], text.strip())
    return [answers[number] for number in range(len(tasks))]


class Evaluator:
    """The loss and the exact match of a state on held-out conversations; called by the loop.

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
        loss: HeldOutLoss,
        directory: Path,
        mesh: Mesh,
    ):
        self._model, self._partition, self._base = model.clone(remat="none", scan_layers=False), partition, base
        self._processor, self._tasks, self._directory = processor, tasks, directory
        assert partition.config.evaluation is not None  # the run has none to call otherwise
        self._config, self._loss, self._told = partition.config.evaluation, loss, False
        self._exact = not has_free_text(tasks) if self._config.exact_match is None else self._config.exact_match
        if not self._exact:
            self._tasks = tasks[: self._config.show]
        if jax.process_count() > 1:
            mesh = make_mesh(1, -1, 1, jax.local_devices())
        self._mesh = mesh if mesh.size > 1 else None

    @property
    def description(self) -> str:
        """What is measured, in words."""
        every = self._config.every
        when = f"every {every:,} steps and at the end" if every else "at the end (evaluation.every)"
        exact = "exact match" if self._exact else "no exact match, as the answers are free text (evaluation.exact_match)"
        return f"held out: {self._loss.count:,} records of {self._config.path}, {when}: loss and {exact}"

    def __call__(
        self, state: TrainState, step: int, display: Display, stopped: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """Compute the loss, answer the questions, and write samples.html and evaluation.json.

        Args:
            state: the state.
            step: its step.
            display: shows how far it is.
            stopped: whether to give up.

        Returns:
            The figures of HeldOutLoss, exact_match, the share of exact answers, where it is measured, and evaluation_s in
            seconds; None if it gave up.
        """
        started = time.perf_counter()
        found = self._loss(state, display, stopped)
        if found is None:
            return None
        if not self._told:
            self._told = True
            for line in self._loss.told[:_SHOWN]:
                display.remark(f"left out of the held-out loss, {line}")
        if self._tasks:
            share = self._answer(state, step, display, stopped)
            if share is None:
                return None
            found |= {"exact_match": share} if self._exact else {}
        return {**found, "evaluation_s": time.perf_counter() - started}

    def _answer(self, state: TrainState, step: int, display: Display, stopped: Callable[[], bool]) -> float | None:
        """Answer the questions; the share of exact answers, None if it gave up."""
        tasks = self._tasks
        params = self._partition.combine(self._base, state.params)
        count = jax.process_count()
        if count > 1:
            params = on_host(params)
            if self._mesh is not None:
                axes = join(self._partition.base_axes, self._partition.axes)
                params = jax.device_put(params, parameter_shardings(params, axes, self._mesh))
            tasks = tasks[jax.process_index() :: count]

        def going_on(done: int) -> bool:
            display.doing(f"held-out answers, {done:,} of {len(tasks):,}")
            return not stopped()

        data = self._partition.config.data
        own = ask(self._model, params, self._processor, tasks, self._config, data, self._mesh, going_on=going_on)
        display.doing("")
        if own is None:
            return None
        found = everyones([[answer.got, answer.error] for answer in own])
        answers = [Answer(*task, *found[i % count][i // count]) for i, task in enumerate(self._tasks)]
        share = sum(answer.right for answer in answers) / len(answers)
        if jax.process_index() == 0:
            self._write(answers, share, step)
        return share

    def _write(self, answers: list[Answer], share: float, step: int) -> None:
        title = f"{Path(self._config.path).name} at step {step}"
        write_page(answers, self._directory / "samples.html", title, self._config.show, exact=self._exact)
        error = lambda answer: {} if answer.error is None else {"error": answer.error}
        rows = [{"wanted": answer.wanted, "got": answer.got, **error(answer)} for answer in answers]
        figures = {"step": step, **({"exact_match": share} if self._exact else {})}
        write_json(self._directory / "evaluation.json", {**figures, "answers": rows})


def write_page(answers: Sequence[Answer], path: Path, title: str, show: int = 50, *, exact: bool = True) -> None:
    """Write a self-contained HTML page of at most `show` answers with small pictures, wrong answers first.

    Args:
        answers: all of them.
        path: of the page.
        title: of the page.
        show: how many of them are shown.
        exact: whether an answer that differs from the wanted one is called wrong.
    """
    right = [answer for answer in answers if answer.right]
    wrong = [answer for answer in answers if not answer.right]
    if not exact:
        right, wrong = list(answers), []
    ordered, half = [*wrong, *right], -(-show // 2)
    rows = [_row(answer) for answer in [*ordered[:half], *[a for a in ordered[half:] if not exact or a.right][: show // 2]]]
    values = {"title": title, "exact": exact, "right": len(right), "count": len(answers), "rows": rows}
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
