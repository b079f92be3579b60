"""How checkpoints of other families name their tensors, and how ours are computed from them.

`smolvlm_jax.families` lists the families and reads their config.json.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from ..config import SmolVLMTextConfig
from ..errors import CheckpointError
from .leaves import Leaf, own
from .readers import TensorReader
from .regions import Region
from .rules import RULES, Match, Names

__all__ = ["FAMILIES", "check_frequencies", "from_unit_pixels", "left_out", "names_of"]


def _row(path: str, name: str, pattern: str | None = None, part: int = 0, parts: int = 1) -> tuple[str, Match]:
    return path, Match(path, name, pattern or RULES[path], part, parts)


_TEXT, _BLOCK = "model/text_model/layers_{l}/", "decoder.blocks.{l}."
_VISION, _VISION_BLOCK = "model/vision_model/encoder/layers_{l}/", "vision_encoder.blocks.{l}."
_PATCHES = "model/vision_model/embeddings/patch_embedding"
_NANOVLM = dict(
    [
        _row("lm_head/kernel", "decoder.head.weight"),
        _row("model/connector/modality_projection/proj/kernel", "MP.proj.weight"),
        _row("model/text_model/embed_tokens/embedding", "decoder.token_embedding.weight"),
        _row("model/text_model/norm/scale", "decoder.norm.weight"),
        _row(f"{_TEXT}input_layernorm/scale", f"{_BLOCK}norm1.weight"),
        _row(f"{_TEXT}post_attention_layernorm/scale", f"{_BLOCK}norm2.weight"),
        *(_row(f"{_TEXT}self_attn/{name}_proj/kernel", f"{_BLOCK}attn.{name}_proj.weight") for name in "qkv"),
        _row(f"{_TEXT}self_attn/o_proj/kernel", f"{_BLOCK}attn.out_proj.weight"),
        *(_row(f"{_TEXT}mlp/{name}_proj/kernel", f"{_BLOCK}mlp.{name}_proj.weight") for name in ("gate", "up", "down")),
        _row(f"{_PATCHES}/kernel", "vision_encoder.patch_embedding.conv.weight"),
        _row(f"{_PATCHES}/bias", "vision_encoder.patch_embedding.conv.bias"),
        _row(
            "model/vision_model/embeddings/position_embedding/embedding",
            "vision_encoder.patch_embedding.position_embedding",
            "() v d -> v d",
        ),
        _row("model/vision_model/post_layernorm/scale", "vision_encoder.layer_norm.weight"),
        _row("model/vision_model/post_layernorm/bias", "vision_encoder.layer_norm.bias"),
        *(
            _row(f"{_VISION}layer_norm{number}/{ours}", f"{_VISION_BLOCK}ln{number}.{theirs}")
            for number in (1, 2)
            for ours, theirs in (("scale", "weight"), ("bias", "bias"))
        ),
        *(
            _row(f"{_VISION}self_attn/{name}_proj/{ours}", f"{_VISION_BLOCK}attn.qkv_proj.{theirs}", None, part, 3)
            for part, name in enumerate("qkv")
            for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
        ),
        *(
            _row(f"{_VISION}{holder}/{ours}", f"{_VISION_BLOCK}{name}.{theirs}")
            for holder, name in (("self_attn/out_proj", "attn.out_proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2"))
            for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
        ),
    ]
)
_EXPERT = "the action expert"
_STATISTICS = "statistics of states and actions"
# By the names in `families`.
FAMILIES: Mapping[str, Names] = {
    "nanovlm": Names(rows=_NANOVLM, left_out={"decoder.rotary_embd.inv_freq": "the rotary embedding's frequencies"}),
    "smolvla": Names(
        prefix="model.vlm_with_expert.vlm.",
        left_out={
            "model.vlm_with_expert.lm_expert.": _EXPERT,
            **{f"model.{name}.": _EXPERT for name in ("state_proj", "action_in_proj", "action_out_proj")},
            **{f"model.action_time_mlp_{end}.": _EXPERT for end in ("in", "out")},
            **{f"{name}.": _STATISTICS for name in ("normalize_inputs", "normalize_targets", "unnormalize_outputs")},
        },
    ),
}


def names_of(family: str | None, tensors: Mapping[str, tuple[int, ...]]) -> Names | None:
    """The names of a checkpoint's tensors; None if they are ours.

    Args:
        family: as in `families`, None for our own.
        tensors: the tensors that the checkpoint has.
    """
    if family == "nanovlm" and "decoder.token_embedding.weight" not in tensors:
        # Of two names of one tied tensor, safetensors keeps the first by the alphabet.
        embedding = "model/text_model/embed_tokens/embedding"
        rows = {**_NANOVLM, embedding: Match(embedding, "decoder.head.weight", RULES[embedding])}
        return Names(rows=rows, left_out=FAMILIES[family].left_out)
    if family is not None:
        return FAMILIES[family]
    if any(name.startswith(FAMILIES["smolvla"].prefix) for name in tensors):
        return FAMILIES["smolvla"]
    if "custom_text_proj.weight" in tensors:  # what other retrieval models call the projection of ColIdefics3
        return Names(rows=dict(_row(f"linear/{ours}", f"custom_text_proj.{theirs}") for ours, theirs in _PROJECTION))
    return None


_PROJECTION = (("kernel", "weight"), ("bias", "bias"))


def from_unit_pixels(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The leaves of an encoder that reads pixels x from 0 to 1, changed so that it reads y = 2 x - 1, as ours do.

    W x + b = (W / 2) y + (b + the sum of W / 2): halving is exact, the bias is rounded once.
    """
    kernel, bias = leaves[f"{_PATCHES}/kernel"], leaves[f"{_PATCHES}/bias"]
    return {**leaves, kernel.path: _Computed(kernel, _halved, kernel), bias.path: _Computed(bias, _raised, bias, kernel)}


def _halved(kernel: Leaf) -> np.ndarray:
    return kernel.read(dtype=np.dtype(np.float32)) / 2


def _raised(bias: Leaf, kernel: Leaf) -> np.ndarray:
    wide = np.dtype(np.float64)
    return bias.read(dtype=wide) + kernel.read(dtype=wide).sum(axis=(0, 1, 2)) / 2


class _Computed(Leaf):
    """A parameter that is computed from others when it is read, in the dtype of one of them."""

    def __init__(self, like: Leaf, compute: Callable[..., np.ndarray], *sources: Leaf):
        self.path, self.shape, self.dtype = like.path, like.shape, like.dtype
        self._compute, self._sources = compute, sources

    def read(self, region: Region | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        found = own(self._compute(*self._sources), self.dtype)
        return own(found[... if region is None else region], dtype)


def check_frequencies(tensors: TensorReader, config: SmolVLMTextConfig, where: Path) -> None:
    """Raise CheckpointError if a nanoVLM's rotary frequencies, which its files hold, are not those that its config says."""
    name = next(iter(FAMILIES["nanovlm"].left_out))
    if name not in tensors.shapes:
        return
    wanted = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    found = tensors.read(name).astype(np.float64)
    if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-2):  # they may be rounded to bfloat16
        raise CheckpointError(f"{where}: {name} is not what lm_re_base = {config.rope_theta:g} makes")


def left_out(names: Names | None, tensors: Iterable[str]) -> list[str]:
    """What a checkpoint holds besides the model, in words with the numbers of tensors."""
    counts: Counter[str] = Counter()
    for name in tensors:
        for beginning, what in (names.left_out if names else {}).items():
            counts[what] += name.startswith(beginning)
    return [f"{what} ({count} tensors)" for what, count in counts.items() if count]
