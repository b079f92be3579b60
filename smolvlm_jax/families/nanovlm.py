"""nanoVLM (github.com/huggingface/nanoVLM): a SigLIP2 encoder, a SmolLM2 decoder and a pixel-shuffle projector, as SmolVLM's.

Its config.json is a flat dataclass of other names. Its tokenizer is another model's, with tokens for pictures added. Pictures
are stretched to whole tiles, and the whole picture comes before the grid. Pixels are not normalised: they are 0 to 1, and
the weights are converted for ours (`convert.family_names`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..io import MAX_TEXT, read_json
from .translation import Translation

__all__ = ["recognises", "translate"]

_GRID = {f"r{row}c{col}": f"<row_{row}_col_{col}>" for row in range(1, 9) for col in range(1, 9)}
# The keys of a config.json that count, with the defaults of nanoVLM's VLMConfig, which fill in what a file lacks.
_DEFAULTS: Mapping[str, Any] = {
    "vit_hidden_dim": 768,
    "vit_inter_dim": 3072,
    "vit_patch_size": 16,
    "vit_img_size": 512,
    "vit_n_heads": 12,
    "vit_n_blocks": 12,
    "vit_ln_eps": 1e-6,
    "vit_cls_flag": False,
    "lm_hidden_dim": 960,
    "lm_inter_dim": 2560,
    "lm_rms_eps": 1e-5,
    "lm_re_base": 100000,
    "lm_max_position_embeddings": 8192,
    "lm_base_vocab_size": 49152,
    "lm_vocab_size": 49218,
    "lm_n_heads": 15,
    "lm_n_kv_heads": 5,
    "lm_attn_scaling": 1.0,
    "lm_n_blocks": 32,
    "lm_use_tokens": False,
    "lm_tie_weights": True,
    "lm_tokenizer": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "lm_chat_template": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "mp_pixel_shuffle_factor": 4,
    "mp_image_token_length": 64,
    "max_img_size": 2048,
    "resize_to_max_side_len": True,
    "vlm_extra_tokens": {"image_token": "<|image|>", "global_image_token": "<|global_image|>", **_GRID},
}
# Keys with one of these beginnings say what is computed. These do so in training alone, or name what was started from.
_COMPUTED = ("vit_", "lm_", "mp_")
_TRAINING = ("vit_dropout", "lm_dropout", "vit_model_type", "lm_model_type", "lm_max_length")
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
# In front of nanoVLM's template, which knows contents that are strings: the items of a content become one.
_AS_STRINGS = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}{%- set line = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set line.text = message['content'] -%}{%- else -%}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'text' -%}{%- set line.text = line.text + item['text'] -%}"
    "{%- elif item['type'] == 'image' -%}{%- set line.text = line.text + 'IMAGE' -%}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': line.text}] -%}{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)


def recognises(data: Mapping[str, Any]) -> bool:
    """Whether a config.json is nanoVLM's."""
    return "model_type" not in data and all(name in data for name in ("vit_hidden_dim", "lm_hidden_dim"))


def translate(path: Path, data: Mapping[str, Any], find: Callable[[str], Path]) -> Translation:
    """A checkpoint of nanoVLM. Arguments and errors as in `families.translated`."""
    given = {**_DEFAULTS, **data}
    _check(path, given, data)
    tokens: dict[str, str] = given["vlm_extra_tokens"]
    first = given["lm_base_vocab_size"]
    ids = {token: first + place for place, token in enumerate(tokens.values())}
    written: dict[str, dict[str, Any]] = {}
    copied: dict[str, Path] = {}
    missing, stop = "", None
    try:
        directory = find(given["lm_tokenizer"])
    except CheckpointError as error:
        missing = f"{path} names the tokenizer {given['lm_tokenizer']}, which cannot be had ({error})"
    else:
        copied = {name: directory / name for name in _TOKENIZER if (directory / name).is_file()}
        settings, ids, stop = _tokenizer(path, directory, given)
        written["tokenizer_config.json"] = settings
        if stop is not None:
            written["generation_config.json"] = {"eos_token_id": stop, "pad_token_id": stop}
    image = ids[tokens["image_token"]]
    if image >= given["lm_vocab_size"]:
        raise ConfigError(
            f"{path}: the image token {tokens['image_token']} would be number {image} of lm_vocab_size = "
            f"{given['lm_vocab_size']}: checkpoints from before nanoVLM had such a token are not supported"
        )
    written["preprocessor_config.json"] = {
        "image_processor_type": "SmolVLMImageProcessor",
        "tiling": "nanovlm" if "global_image_token" in tokens else "nanovlm-grid",
        "size": {"longest_edge": given["max_img_size"]},
        "max_image_size": {"longest_edge": given["vit_img_size"]},
        "do_upscale": given["resize_to_max_side_len"],
        "resample": 3,
    }
    written["processor_config.json"] = {"image_seq_len": given["mp_image_token_length"], "processor_class": "SmolVLMProcessor"}
    return Translation(family="nanovlm", config=_config(given, image, stop), written=written, copied=copied, missing=missing)


def _check(path: Path, given: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Raise ConfigError for what is not computed here."""

    def require(fits: bool, key: str, why: str) -> None:
        if not fits:
            raise ConfigError(f"{path}: {key} = {given[key]!r:.80} is not supported: {why}")

    for key in data:
        known = key in _DEFAULTS or key in _TRAINING or not key.startswith(_COMPUTED)
        require(known, key, "nanoVLM has no such key")
    for key, default in _DEFAULTS.items():
        kind = (int, float) if isinstance(default, float) else type(default)
        fits = isinstance(given[key], kind) and (isinstance(default, bool) or not isinstance(given[key], bool))
        require(fits, key, f"it must be a value like {default!r:.40}")
    require(not given["vit_cls_flag"], "vit_cls_flag", "the encoder has no class token here")
    require(not given["lm_use_tokens"], "lm_use_tokens", "the decoder of a VLM reads embeddings")
    require(given["lm_attn_scaling"] == 1, "lm_attn_scaling", "rotary embeddings are not scaled here")
    for key in ("vit_patch_size", "mp_pixel_shuffle_factor", "lm_n_heads", "vit_img_size", "max_img_size"):
        require(given[key] > 0, key, "it must be positive")
    require(given["lm_hidden_dim"] % given["lm_n_heads"] == 0, "lm_n_heads", "it does not divide lm_hidden_dim")
    side = given["vit_img_size"] // given["vit_patch_size"] // given["mp_pixel_shuffle_factor"]
    require(given["mp_image_token_length"] == side**2, "mp_image_token_length", f"a tile makes {side**2} image tokens")
    require(given["max_img_size"] % given["vit_img_size"] == 0, "max_img_size", "it must be a multiple of vit_img_size")
    tokens = given["vlm_extra_tokens"]
    require(all(isinstance(token, str) for token in tokens.values()), "vlm_extra_tokens", "tokens are texts")
    image = tokens.get("image_token", "")
    require(image and image.isprintable() and not set(image) & set("'\\"), "vlm_extra_tokens", "there is no image_token")
    odd = [name for name in tokens if name in _GRID and tokens[name] != _GRID[name]]
    require(not odd, "vlm_extra_tokens", f"the token {odd[0] if odd else ''} of the grid is not <row_…_col_…>")


def _tokenizer(path: Path, directory: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int], int | None]:
    """tokenizer_config.json with nanoVLM's tokens, numbered on from the vocabulary's end; their ids; that of the stop token."""
    settings = read_json(directory / "tokenizer_config.json", missing_ok=True)
    if "added_tokens_decoder" not in settings:  # then, as in transformers, this file counts
        settings |= read_json(directory / "special_tokens_map.json", missing_ok=True)
    known: dict[str, int] = {}
    if (directory / "tokenizer.json").is_file():
        data = read_json(directory / "tokenizer.json", limit=MAX_TEXT)
        known = {**data["model"]["vocab"], **{token["content"]: token["id"] for token in data.get("added_tokens") or []}}
    elif (directory / "vocab.json").is_file():
        known = read_json(directory / "vocab.json", limit=MAX_TEXT)
    else:
        raise CheckpointError(f"{path} names the tokenizer {directory}, which has neither tokenizer.json nor vocab.json")
    ids, free = {}, max(known.values(), default=-1) + 1
    for token in given["vlm_extra_tokens"].values():
        ids[token] = known.get(token, free)
        free += token not in known
    eos = settings.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    extra = settings.get("extra_special_tokens")
    return (
        {
            **settings,
            "extra_special_tokens": {**(extra if isinstance(extra, dict) else {}), **given["vlm_extra_tokens"]},
            "pad_token": eos,
            "chat_template": _AS_STRINGS.replace("IMAGE", given["vlm_extra_tokens"]["image_token"]) + given["lm_chat_template"],
        },
        ids,
        known.get(str(eos)),
    )


def _config(given: Mapping[str, Any], image: int, stop: int | None) -> dict[str, Any]:
    """config.json in our spelling."""
    return {
        "model_type": "smolvlm",
        "image_token_id": image,
        "scale_factor": given["mp_pixel_shuffle_factor"],
        "tie_word_embeddings": given["lm_tie_weights"],
        "vision_config": {
            "hidden_size": given["vit_hidden_dim"],
            "intermediate_size": given["vit_inter_dim"],
            "num_hidden_layers": given["vit_n_blocks"],
            "num_attention_heads": given["vit_n_heads"],
            "image_size": given["vit_img_size"],
            "patch_size": given["vit_patch_size"],
            "layer_norm_eps": given["vit_ln_eps"],
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": given["lm_vocab_size"],
            "hidden_size": given["lm_hidden_dim"],
            "intermediate_size": given["lm_inter_dim"],
            "num_hidden_layers": given["lm_n_blocks"],
            "num_attention_heads": given["lm_n_heads"],
            "num_key_value_heads": given["lm_n_kv_heads"],
            "max_position_embeddings": given["lm_max_position_embeddings"],
            "rms_norm_eps": given["lm_rms_eps"],
            "rope_theta": given["lm_re_base"],
            "pad_token_id": stop,
            "bos_token_id": None,
            "eos_token_id": stop,
        },
    }
