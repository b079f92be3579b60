"""The command line: `smolvlm-jax generate | batch | convert | verify | train | plan | models | recipes | doctor | completion`.

Imports nothing heavy before a command runs.

A user's mistake is one line on stderr and exit code 2, trouble of the machine one line and exit code 1; `--traceback` shows
where it came from.
"""

import argparse
import sys
import warnings

from . import __version__
from .arguments import Parser
from .batch.cli import add_parser as add_batch
from .convert.cli import add_parsers as add_converter
from .doctor import add_parser as add_doctor
from .errors import SmolVLMError
from .garbage import rare_collections
from .generate_cli import add_parser as add_generate
from .listings import add_parsers as add_listings
from .plan.cli import add_parser as add_plan
from .terminal import say, standard_streams
from .train.cli import add_parser as add_train

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="smolvlm-jax", description="SmolVLM and SmolVLM2 in JAX/Flax.")
    parser.add_argument("--version", action="version", version=f"smolvlm-jax {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show the full traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_generate, add_batch, add_converter, add_train, add_plan, add_listings, add_doctor):
        add(commands)
    commands.choices["completion"].set_defaults(whole=parser)
    return parser


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of a command. Where it takes any number of words, some may stand behind a switch."""
    parser = _parser()
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0].startswith("--") and words[0].partition("=")[0] not in parser._option_string_actions:
        parser.error(f"{words[0]} stands before the command: smolvlm-jax COMMAND {words[0]} …")
    options, left = parser.parse_known_args(arguments)
    if hasattr(options, "overrides"):
        options.overrides += [word for word in left if not word.startswith("-")]
        left = [word for word in left if word.startswith("-")]
    if left:
        if hasattr(options, "overrides") and "recipe" in options and left[0].startswith("--"):
            word = left[0].lstrip("-").partition("=")[0].replace("-", "_")
            message = f"there is no option {left[0]}: keys of a recipe are written without dashes, {word}=VALUE"
            options.parser.error(message)
        options.parser.refuse(left)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    with standard_streams(), warnings.catch_warnings(), rare_collections():
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
