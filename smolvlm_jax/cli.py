"""The command line: `smolvlm-jax generate | batch | convert | verify | train`. Imports nothing heavy before a command runs.

A user's mistake is one line on stderr and exit code 2; `--traceback` shows where it came from.
"""

import argparse
import os
import sys
from collections.abc import Iterator

from . import __version__
from .errors import SmolVLMError

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="smolvlm-jax", description="SmolVLM and SmolVLM2 in JAX/Flax.")
    parser.add_argument("--version", action="version", version=f"smolvlm-jax {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show the full traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)

    from .batch.cli import add_parser
    from .convert.cli import add_parsers
    from .train.cli import add_parser as add_train

    add_parser(commands)
    add_parsers(commands)
    add_train(commands)
    return parser


def _add_generate(commands) -> None:
    command = commands.add_parser("generate", help="answer a question about pictures", description="Stream an answer.")
    command.add_argument("prompt", metavar="PROMPT", help="the question, or - to read it from standard input")
    command.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    command.add_argument(
        "--model", default="tiny", metavar="NAME|DIR", help="bundled name, directory or Hub id (default: tiny)"
    )
    command.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    command.add_argument("--do-sample", action="store_true", help="draw tokens instead of taking the most likely one")
    command.add_argument("--temperature", type=float, default=None)
    command.add_argument("--top-k", type=int, default=None)
    command.add_argument("--top-p", type=float, default=None)
    command.add_argument("--min-p", type=float, default=None)
    command.add_argument("--repetition-penalty", type=float, default=None)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: bfloat16, on CPU float32")
    command.set_defaults(run=_generate)


def _text_pieces(processor, tokens: Iterator[int]) -> Iterator[str]:
    """Decoded text as it grows. A character of several tokens appears when it is whole."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = processor.decode(ids, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            continue
        yield text[len(shown) :]
        shown = text


def _generate(options: argparse.Namespace) -> int:
    from .checkpoint import load, resolve
    from .generation import stream
    from .processing import SmolVLMProcessor

    directory = resolve(options.model)
    processor = SmolVLMProcessor.from_pretrained(directory)
    prompt = sys.stdin.read().rstrip("\n") if options.prompt == "-" else options.prompt
    content = [{"type": "image", "path": path} for path in options.image]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="np",
        pixel_format="uint8",
    )
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = {name: value for name in names if (value := getattr(options, name)) is not None}
    model, params = load(directory, dtype=options.dtype)
    steps = stream(
        model,
        params,
        **inputs,
        max_new_tokens=options.max_new_tokens,
        do_sample=options.do_sample,
        seed=options.seed,
        **sampling,
    )
    blank = True  # the space that separates an answer from "Assistant:" is not part of it
    for piece in _text_pieces(processor, (int(step[0]) for step in steps)):
        piece = piece.lstrip() if blank else piece
        blank = blank and not piece
        print(piece, end="", flush=True)
    print()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except SmolVLMError as error:
        if options.traceback:
            raise
        print(f"smolvlm-jax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader went away (`| head`); what is left must not raise again when the interpreter closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
