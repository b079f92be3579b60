"""`smolvlm-jax generate`: one answer, or a conversation. Importing this module imports nothing heavy."""

import argparse
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .arguments import add_command, add_machine, add_model, add_pictures, add_sampling, given, model_names
from .errors import InputError, MediaError, PromptError, device_errors
from .generation_config import GenerationConfig, SamplingParams
from .media_options import PictureOptions
from .progress import Progress
from .records.kinds import PDFS
from .terminal import on_terminal, say

__all__ = ["add_parser"]

_MEDIA = ("image", "video")
_BUNDLED = "tiny"
_PDF = re.compile(rf"({'|'.join(map(re.escape, PDFS))})(#\d+)?$", re.IGNORECASE)
_FIRST = "PROMPT is the argument without an option: smolvlm-jax generate --image FILE PROMPT"
_HABITS = {
    **dict.fromkeys(("--prompt", "--question", "--text", "--user-prompt", "--instruction"), _FIRST),
    "--pdf-dpi": "PDFs are read by smolvlm-jax batch",
}


class _Append(argparse.Action):
    """Pictures and videos in the order in which they are named, as parts of a message."""

    def __call__(self, parser, namespace, value, option_string=None):
        part = {"type": (option_string or "").lstrip("-"), "path": value}
        namespace.media = [*namespace.media, part]


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    command = add_command(
        commands,
        "generate",
        run,
        help="answer a question about pictures and videos",
        description="Stream an answer, or with --chat hold a conversation.",
        examples=(
            'smolvlm-jax generate --image examples/number.png "What number is written here?"',
            'smolvlm-jax generate --model HuggingFaceTB/SmolVLM2-2.2B-Instruct --video clip.mp4 "What happens?"',
        ),
        habits=_HABITS,
        surplus="; PROMPT is one word, in quotes, and pictures are named by --image FILE",
    )
    command.add_argument("prompt", metavar="PROMPT", nargs="?", help="the question, or - to read it from standard input")
    asked = command.add_argument_group("question")
    for kind in _MEDIA:
        asked.add_argument(
            f"--{kind}",
            dest="media",
            action=_Append,
            default=[],
            metavar="FILE",
            help=f"a {'picture' if kind == 'image' else 'video'}; may be repeated",
        )
    asked.add_argument(
        "--chat",
        action="store_true",
        help="go on asking: each line of standard input is a question; /image FILE and /video FILE belong to the next one, "
        "/clear starts anew, the end of the input ends it",
    )
    add_model(command, "tiny, the bundled reader of digits")
    add_sampling(command, SamplingParams, without=("stop", "ignore_eos", "repetition_window"))
    add_pictures(command, without=("pdf_dpi",))
    add_machine(command, cache=True)


def _kinds(media: list[dict[str, str]]) -> set[str]:
    """What is asked about."""
    kinds = {"image": ("picture", "picture that is not of a PDF"), "video": ("video",)}
    return {kind for part in media for kind in kinds[part["type"]]}


def _refuse_pdfs(media: list[dict[str, str]]) -> None:
    """Raise MediaError for a PDF, or a page of one."""
    for path in (part["path"] for part in media):
        if found := _PDF.search(path):
            file = path[: found.end(1)]
            raise MediaError(
                f"{path!r} is a PDF, which generate does not read: smolvlm-jax batch {shlex.quote(file)} OUTPUT --model NAME "
                "--prompt PROMPT answers each page"
            )


def run(options: argparse.Namespace) -> int:
    if options.prompt is None and not options.chat:
        raise InputError('there is no question: pass PROMPT, such as "What is in this picture?", - to read one, or --chat')
    if options.prompt == "-" and options.chat:
        raise InputError("with --chat standard input holds the conversation: pass the first question as PROMPT")
    if options.prompt is not None and not options.prompt.strip() and not options.media:
        raise InputError('the question is empty: pass PROMPT, such as "What is in this picture?"')
    with Progress() as progress:
        conversation = _Conversation(options, progress)
        media = list(options.media)
        if options.prompt is not None:
            conversation.ask(_standard_input() if options.prompt == "-" else options.prompt, media)
            media = []
        if options.chat:
            conversation.go_on(media)
    return 0


@contextmanager
def _ends_at_once() -> Iterator[None]:
    """Within the block Ctrl-C ends the process. Python's own handler would wait until a compilation, or a tile, is done."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT)
    if ours is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, ours)


def _one_place() -> bool:
    """Whether standard output and standard error are the same file or pipe, as after `2>&1`."""
    with suppress(OSError, ValueError, AttributeError):  # streams without descriptors
        return os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    return False


def _standard_input() -> str:
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not valid {error.encoding}: {error.reason} at byte {error.start}") from error


class _Conversation:
    """The turns so far, and the model that answers the next one. Weights are read when the first prompt has been checked."""

    def __init__(self, options: argparse.Namespace, progress: Progress):
        from .checkpoint import resolve
        from .config import SmolVLMConfig
        from .locate import adapted
        from .processing.options import call_options, open_processor

        self._progress = progress
        progress.tell("looking for the model")
        names = model_names(options)
        self._unnamed = names == {"model": None, "adapter": None}
        if self._unnamed:
            names["model"] = _BUNDLED
        self._source, self._base = adapted(**names)
        directory, pictures = resolve(self._source, base=self._base), PictureOptions(**given(options, PictureOptions))
        self._options = options
        _refuse_pdfs(options.media)
        if not options.chat:  # which may have pictures later
            pictures.require_use(_kinds(options.media), "the question")
        self._processor = open_processor(directory, pictures)
        self._call = call_options(pictures)
        self._longest = SmolVLMConfig.from_pretrained(directory).text_config.max_position_embeddings - 1
        self._sampling = {"max_new_tokens": SamplingParams.max_new_tokens, **given(options, SamplingParams)}
        asked = SamplingParams(**self._sampling)  # wrong values are told before weights are read
        if idle := asked.without_effect(GenerationConfig.from_pretrained(directory)):
            flags = ", ".join("--" + name.replace("_", "-") for name in idle)
            raise InputError(f"{flags}: without effect where the most likely token is taken; add --do-sample, or leave it out")
        self._loaded: Any = None
        self.turns: list[dict[str, Any]] = []

    def ask(self, question: str, media: list[dict[str, str]]) -> None:
        """Print the answer to a question as it is drawn, and keep both."""
        from .processing.bounds import check_length

        _refuse_pdfs(media)
        turns = [*self.turns, {"role": "user", "content": [*media, {"type": "text", "text": question}]}]
        self._progress.tell("preparing the question")
        check_length(self._processor, turns, self._longest)
        inputs = self._processor.encode_chat(turns, **self._call)
        with device_errors("--max-new-tokens, or take --dtype bfloat16"), _ends_at_once():
            answer = ""
            for piece in _text_pieces(self._processor, self._tokens(inputs)):
                self._writing()
                print(piece, end="", flush=True)
                answer += piece
        self._progress.pause()
        print(flush=True)
        self.turns = [*turns, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]

    def _writing(self) -> None:
        """An answer appears, where the lines of progress stand if both go to one terminal, file or pipe."""
        if sys.stdout.isatty() or _one_place():
            self._progress.pause()
        else:
            self._progress.tell("writing the answer")

    def go_on(self, media: list[dict[str, str]]) -> None:
        """Answer the lines of standard input. What is wrong with a question is said, and the conversation goes on."""
        while (line := self._line()) is not None:
            word, _, rest = line.partition(" ")
            if word == "/clear":
                self.turns, media = [], []
            elif word.lstrip("/") in _MEDIA and word.startswith("/"):
                media.append({"type": word[1:], "path": rest.strip()})
            elif line.startswith("/"):
                say(f"{word} is none of /image FILE, /video FILE, /clear")
            elif line:
                try:
                    self.ask(line, media)
                except (MediaError, PromptError) as error:
                    say(str(error))
                media = []

    def _line(self) -> str | None:
        if on_terminal() and sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not valid {error.encoding}: {error.reason} at byte {error.start}") from error
        return line.strip() if line else None

    def _tokens(self, inputs: dict[str, Any]) -> Iterator[int]:
        self._progress.tell("loading jax")
        from .checkpoint import load
        from .compilation_cache import keep_compiled_programs
        from .generation import stream

        if self._loaded is None:
            options = self._options
            self._progress.tell("loading the weights")
            keep_compiled_programs(options.compilation_cache)
            self._loaded = load(
                self._source, base=self._base, dtype=options.dtype, attention=options.attention, check=options.check
            )
        model, params = self._loaded
        steps = stream(model, params, **inputs, **self._sampling, report=self._progress.tell)  # which checks its arguments
        if self._unnamed and not self.turns:
            say(f"no --model is given: this is {_BUNDLED}, which reads handwritten numbers and little else")
        return (int(step[0]) for step in steps)


def _text_pieces(processor, tokens: Iterator[int]) -> Iterator[str]:
    """Decoded text as it grows, without the space that separates it from "Assistant:". A character of several tokens appears
    once all of them are here."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = processor.decode(ids, skip_special_tokens=True).lstrip()
        if text.endswith("\ufffd"):
            continue
        yield text[len(shown) :]
        shown = text
