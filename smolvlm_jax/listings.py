"""`smolvlm-jax models` and `completion`: the names that a user can choose from. Importing this module imports nothing heavy."""

import argparse

from .arguments import add_command
from .errors import import_extra
from .terminal import show, table

__all__ = ["add_parsers", "list_models"]

_SHELLS = ("bash", "zsh", "tcsh")


def list_models() -> list[tuple[str, str]]:
    """The name of each bundled and published checkpoint, and in words: parameters, memory of its weights, tiles, context."""
    import jax

    from .config import SmolVLMConfig
    from .locate import HUB_IDS, bundled_models, resolve_file
    from .model import SmolVLMForConditionalGeneration
    from .parameters import abstract_params
    from .sizes import published_config

    configs = {name: SmolVLMConfig.from_pretrained(resolve_file(name)) for name in bundled_models()}
    configs |= {name: published_config(name.rpartition("/")[2]) for name in HUB_IDS}
    rows = []
    for name, config in configs.items():
        model = SmolVLMForConditionalGeneration(config)
        count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model, "bfloat16")))
        side = config.vision_config.image_size
        text = (
            f"{count / 1e6:,.1f} M parameters, {2 * count / 1e9:.3g} GB in bfloat16; a tile of {side} × {side} pixels is "
            f"{config.image_seq_len} tokens; up to {config.text_config.max_position_embeddings:,} tokens"
        )
        rows.append((name, text if "/" in name else f"bundled; {text}"))
    return rows


def _models(options: argparse.Namespace) -> int:
    show(table(list_models()))
    return 0


def _completion(options: argparse.Namespace) -> int:
    shtab = import_extra("shtab", "completion in a shell", "completion")
    show(shtab.complete(options.whole, options.shell))
    return 0


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Register the commands."""
    add_command(
        commands,
        "models",
        _models,
        help="list the checkpoints that can be named",
        description="List the bundled and the published checkpoints, with the memory that their weights take.",
        examples=("smolvlm-jax models", "smolvlm-jax generate --model HuggingFaceTB/SmolVLM-256M-Instruct …"),
    )
    completion = add_command(
        commands,
        "completion",
        _completion,
        help="print a script that completes commands in a shell",
        description="Print a script with which a shell completes commands and options.",
        examples=(
            "smolvlm-jax completion bash > ~/.local/share/bash-completion/completions/smolvlm-jax",
            'smolvlm-jax completion zsh > "${fpath[1]}/_smolvlm-jax"',
        ),
    )
    completion.add_argument("shell", choices=_SHELLS, help="the shell")
