"""`smolvlm-jax train RECIPE [key=value …]`. Importing this module imports nothing heavy."""

import argparse
from dataclasses import replace

from ..arguments import add_check, add_command, add_quiet
from ..errors import device_errors
from ..terminal import show

__all__ = ["add_parser"]


def run_train(args: argparse.Namespace) -> int:
    from .recipes import load_recipe

    config = load_recipe(args.recipe, args.overrides)
    config = replace(config, check=config.check or args.check)
    if args.print:
        import yaml

        from .plain import to_dict

        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="", flush=True)
        return 0
    from .malloc import keep_freed_memory

    keep_freed_memory()
    import jax

    from .metrics import figures
    from .runner import run

    with device_errors("data.batch_size or data.length, or take remat: full"):
        result = run(config, progress=False if args.quiet else None)
    if not args.quiet and jax.process_index() == 0:
        shown = ", ".join(f"{name} {text}" for name, text in figures(result.metrics).items())
        show(f"{result.directory}: step {result.metrics.get('step')}, {shown}")
        if result.model is not None:
            show(f"{result.model}: Hugging Face format")
    return 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    command = add_command(
        commands,
        "train",
        run_train,
        help="fine-tune a checkpoint",
        description="Train as a recipe says: a YAML file, or the name of a built-in one. An interrupted run resumes from its "
        "newest checkpoint.",
    )
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a built-in recipe such as lora-256m")
    command.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe: steps=100 data.length=1024 lora.rank=8"
    )
    command.add_argument("--print", action="store_true", help="print the recipe as it would be run, and stop")
    add_check(command)
    add_quiet(command, "no bar, no summary")
