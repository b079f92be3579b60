"""The command line: `smolvlm-jax generate | batch | convert | verify | train | plan`.

Imports nothing heavy before a command runs.

A user's mistake is one line on stderr and exit code 2, trouble of the machine one line and exit code 1; `--traceback` shows
where it came from.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator

from . import __version__
from .arguments import add_check, add_command, add_machine, add_model, add_pictures, add_sampling, given, model_names
from .batch.cli import add_parser as add_batch
from .convert.cli import add_parsers as add_converter
from .errors import InputError, SmolVLMError, device_errors
from .generation_config import SamplingParams
from .media_options import PictureOptions
from .plan.cli import add_parser as add_plan
from .terminal import say, standard_streams
from .train.cli import add_parser as add_train

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="smolvlm-jax", description="SmolVLM and SmolVLM2 in JAX/Flax.")
    parser.add_argument("--version", action="version", version=f"smolvlm-jax {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show the full traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_generate, add_batch, add_converter, add_train, add_plan):
        add(commands)
    return parser


def _add_generate(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands, "generate", _generate, help="answer a question about pictures", description="Stream an answer."
    )
    command.add_argument("prompt", metavar="PROMPT", help="the question, or - to read it from standard input")
    command.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    add_model(command)
    add_check(command)
    add_sampling(command, SamplingParams, without=("stop", "ignore_eos", "repetition_window"))
    add_pictures(command)
    add_machine(command)


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


def _generate(options: argparse.Namespace) -> int:
    from .checkpoint import load, resolve
    from .config import SmolVLMConfig
    from .generation import stream
    from .locate import adapted
    from .processing.bounds import check_length
    from .processing.options import call_options, open_processor

    source, base = adapted(**model_names(options))
    directory, pictures = resolve(source, base=base), PictureOptions(**given(options, PictureOptions))
    processor = open_processor(directory, pictures)
    try:
        prompt = sys.stdin.read().rstrip("\n") if options.prompt == "-" else options.prompt
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not valid {error.encoding}: {error.reason} at byte {error.start}") from error
    content = [{"type": "image", "path": path} for path in options.image]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    check_length(processor, messages, SmolVLMConfig.from_pretrained(directory).text_config.max_position_embeddings - 1)
    inputs = processor.encode_chat(messages, **call_options(pictures))
    sampling = {"max_new_tokens": SamplingParams.max_new_tokens, **given(options, SamplingParams)}
    with device_errors("--max-new-tokens, or take --dtype bfloat16"):
        model, params = load(source, base=base, dtype=options.dtype, attention=options.attention, check=options.check)
        steps = stream(model, params, **inputs, **sampling)
        for piece in _text_pieces(processor, (int(step[0]) for step in steps)):
            print(piece, end="", flush=True)
    print(flush=True)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of a command. Where it takes any number of words, some may stand behind a switch."""
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    if hasattr(options, "overrides"):
        options.overrides += [word for word in left if not word.startswith("-")]
        left = [word for word in left if word.startswith("-")]
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    with standard_streams(), warnings.catch_warnings():
        options = _parse(arguments)
        warnings.showwarning = lambda message, *place: say(f"warning: {message}")
        try:
            return options.run(options)
        except BrokenPipeError:  # the reader of our output has closed it (`| head`)
            return 141
        except KeyboardInterrupt:
            return 130
        except (SmolVLMError, OSError, MemoryError) as error:
            if options.traceback:
                raise
            say(f"out of memory: {error}" if isinstance(error, MemoryError) else str(error))
            return getattr(error, "exit_code", 1)


if __name__ == "__main__":
    raise SystemExit(main())
