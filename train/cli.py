"""`smolvlm-jax train RECIPE [key=value …]`. Importing this module imports nothing heavy."""

import argparse
from dataclasses import replace

from ..arguments import add_check, add_command, add_quiet
from ..errors import device_errors
from ..terminal import show
from .listing import described

__all__ = ["add_parser"]


def run_train(args: argparse.Namespace) -> int:
    from .recipes import load_recipe

    config = load_recipe(args.recipe, args.overrides)
    config = replace(config, check=config.check or args.check)
    if args.print:
        import yaml

        from .plain import to_dict

        shown = to_dict(config)
        del shown["warmup_fraction" if config.warmup_fraction is None else "warmup_steps"]  # the one that does not count
        print(yaml.safe_dump(shown, sort_keys=False), end="", flush=True)
        return 0
    from .malloc import keep_freed_memory

    keep_freed_memory()
    import jax

    from .progress import shown_figures
    from .runner import run

    with device_errors("data.batch_size or data.length, or take remat: full"):
        result = run(config, progress=False if args.quiet else None)
    if not args.quiet and jax.process_index() == 0:
        show(f"{result.directory}: step {result.metrics.get('step')}, {shown_figures(result.metrics)}")
        if result.model is not None:
            show(f"{result.model}: Hugging Face format")
    return 0


class _List(argparse.Action):
    def __init__(self, **settings):
        super().__init__(nargs=0, **settings)

    def __call__(self, parser, *_):
        show(described(keys=True))
        parser.exit()


def _recipes(options: argparse.Namespace) -> int:
    show(described(keys=options.keys))
    return 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register `train` and `recipes`."""
    recipes = add_command(
        commands,
        "recipes",
        _recipes,
        help="list the built-in recipes of train, and their keys",
        description="List the built-in recipes of `smolvlm-jax train`.",
        examples=("smolvlm-jax recipes --keys", "smolvlm-jax train lora-256m --print"),
    )
    recipes.add_argument("--keys", action="store_true", help="list every key of a recipe too")
    command = add_command(
        commands,
        "train",
        run_train,
        help="fine-tune a checkpoint",
        description="Fine-tune as a recipe says, which is a YAML file or the name of a built-in recipe. An interrupted run "
        "resumes from its newest checkpoint.",
        examples=(
            "smolvlm-jax train lora-256m data.train=conversations.jsonl steps=2000",
            "smolvlm-jax train recipe.yaml lora.rank=16 output=runs/rank16",
        ),
    )
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a built-in recipe such as lora-256m")
    command.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe: steps=100 data.length=1024 lora.rank=8"
    )
    asked = command.add_argument_group("instead of training")
    asked.add_argument("--list", action=_List, help="list the built-in recipes and every key, and stop (default: off)")
    asked.add_argument("--print", action="store_true", help="print the recipe as it would be run, and stop")
    run = command.add_argument_group("run")
    add_check(run)
    add_quiet(run, "no bar, no remarks on progress, no summary")
