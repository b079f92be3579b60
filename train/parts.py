"""Which part of the model a parameter belongs to, which are trained, and trees that hold only some of them."""

from collections.abc import Callable

from .config import TrainConfig

__all__ = ["join", "part_of", "split", "trained"]


def part_of(path: str) -> str:
    """vision, connector, text (the head is the text's) or lora, of a path such as model/text_model/norm/scale."""
    if path.rsplit("/", 1)[-1].startswith("lora_"):
        return "lora"
    for part, name in (("vision", "vision_model"), ("connector", "connector")):
        if path.startswith(f"model/{name}/"):
            return part
    return "text"


def trained(config: TrainConfig, path: str) -> bool:
    """Whether a run changes this parameter."""
    return config.peak(part_of(path)) > 0


def split(tree: dict, choose: Callable[[str], bool], path: str = "") -> tuple[dict, dict]:
    """Two nested dicts: the leaves whose path is chosen, and the others. `join` puts them together again."""
    chosen, others = {}, {}
    for name, value in tree.items():
        here = f"{path}{name}"
        if isinstance(value, dict):
            for target, part in zip((chosen, others), split(value, choose, f"{here}/"), strict=True):
                if part:
                    target[name] = part
        else:
            (chosen if choose(here) else others)[name] = value
    return chosen, others


def join(first: dict, second: dict) -> dict:
    """One nested dict with the leaves of both; where both have one, the second's."""
    out = dict(first)
    for name, value in second.items():
        mine = out.get(name)
        out[name] = join(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return out
