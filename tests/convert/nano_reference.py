"""nanoVLM's model and picture rules, written down from its description: random weights under its names, and what it computes.

Nothing of this shares code with the library: it is what the library's reading of such checkpoints is compared with.
"""

import json
import math
from pathlib import Path

import numpy as np

CONFIG = {
    "vit_hidden_dim": 32,
    "vit_inter_dim": 64,
    "vit_patch_size": 4,
    "vit_img_size": 32,
    "vit_n_heads": 4,
    "vit_dropout": 0.0,
    "vit_n_blocks": 2,
    "vit_ln_eps": 1e-6,
    "vit_cls_flag": False,
    "vit_model_type": "somebody/siglip",
    "lm_hidden_dim": 48,
    "lm_inter_dim": 96,
    "lm_rms_eps": 1e-5,
    "lm_re_base": 10000,
    "lm_max_position_embeddings": 512,
    "lm_base_vocab_size": 150,
    "extra_token_amount": 66,
    "lm_vocab_size": 216,
    "lm_n_heads": 6,
    "lm_n_kv_heads": 2,
    "lm_dropout": 0.0,
    "lm_n_blocks": 2,
    "lm_attn_scaling": 1.0,
    "lm_max_length": 256,
    "lm_use_tokens": False,
    "lm_tie_weights": True,
    "lm_model_type": "somebody/smollm",
    "mp_pixel_shuffle_factor": 2,
    "mp_image_token_length": 16,
    "max_img_size": 96,
    "resize_to_max_side_len": True,
    "vlm_load_backbone_weights": True,
    "vlm_checkpoint_path": "checkpoints",
    "hf_repo_name": "nanoVLM",
}
IMAGE, GLOBAL = 150, 151  # numbered on from lm_base_vocab_size, in the order of vlm_extra_tokens


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor that nanoVLM saves."""
    c = config
    d, f, patch = c["vit_hidden_dim"], c["vit_inter_dim"], c["vit_patch_size"]
    e, g, v = c["lm_hidden_dim"], c["lm_inter_dim"], c["lm_vocab_size"]
    kv = e // c["lm_n_heads"] * c["lm_n_kv_heads"]
    found = {
        "vision_encoder.patch_embedding.conv.weight": (d, 3, patch, patch),
        "vision_encoder.patch_embedding.conv.bias": (d,),
        "vision_encoder.patch_embedding.position_embedding": (1, (c["vit_img_size"] // patch) ** 2, d),
        "vision_encoder.layer_norm.weight": (d,),
        "vision_encoder.layer_norm.bias": (d,),
        "MP.proj.weight": (e, d * c["mp_pixel_shuffle_factor"] ** 2),
        "decoder.norm.weight": (e,),
        "decoder.head.weight": (v, e),
        "decoder.rotary_embd.inv_freq": (e // c["lm_n_heads"] // 2,),
    }
    if not c["lm_tie_weights"]:
        found["decoder.token_embedding.weight"] = (v, e)
    for n in range(c["vit_n_blocks"]):
        block = f"vision_encoder.blocks.{n}"
        linears = {"attn.qkv_proj": (3 * d, d), "attn.out_proj": (d, d), "mlp.fc1": (f, d), "mlp.fc2": (d, f)}
        for name, shape in {**linears, "ln1": (d,), "ln2": (d,)}.items():
            found |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    for n in range(c["lm_n_blocks"]):
        block = f"decoder.blocks.{n}"
        linears = {"attn.q_proj": (e, e), "attn.k_proj": (kv, e), "attn.v_proj": (kv, e), "attn.out_proj": (e, e)}
        linears |= {"mlp.gate_proj": (g, e), "mlp.up_proj": (g, e), "mlp.down_proj": (e, g)}
        for name, shape in {**linears, "norm1": (e,), "norm2": (e,)}.items():
            found[f"{block}.{name}.weight"] = shape
    return found


def frequencies(config: dict) -> np.ndarray:
    head = config["lm_hidden_dim"] // config["lm_n_heads"]
    return (1.0 / config["lm_re_base"] ** (np.arange(0, head, 2) / head)).astype(np.float32)


def write(directory: Path, **changes) -> dict[str, np.ndarray]:
    """A checkpoint with random weights, as nanoVLM's `save_pretrained` leaves it. Returns its tensors."""
    from safetensors.numpy import save_file

    config, rng = {**CONFIG, **changes}, np.random.default_rng(0)
    tensors = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes(config).items()}
    for name in tensors:
        if "norm" in name or ".ln" in name:
            tensors[name] += np.float32(name.endswith("weight"))
    tensors["decoder.rotary_embd.inv_freq"] = frequencies(config)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config, indent=4))
    return tensors


def logits(config: dict, tensors: dict[str, np.ndarray], ids: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """What the model makes of ids (t,) and tiles (n, 3, T, T) with pixels from 0 to 1: float32 (t, vocabulary)."""
    import torch
    from torch.nn import functional as F

    w = {name: torch.from_numpy(value) for name, value in tensors.items()}
    w.setdefault("decoder.token_embedding.weight", w["decoder.head.weight"])
    linear = lambda x, name: F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def normed(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], config["vit_ln_eps"])

    def root_normed(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["lm_rms_eps"]) * w[f"{name}.weight"]

    def heads(x, count):
        return x.unflatten(-1, (count, -1)).transpose(-3, -2)

    def encode(pixels):
        base = "vision_encoder.patch_embedding"
        x = F.conv2d(pixels, w[f"{base}.conv.weight"], w[f"{base}.conv.bias"], stride=config["vit_patch_size"])
        x = x.flatten(2).transpose(1, 2) + w[f"{base}.position_embedding"]
        for n in range(config["vit_n_blocks"]):
            block = f"vision_encoder.blocks.{n}"
            parts = linear(normed(x, f"{block}.ln1"), f"{block}.attn.qkv_proj").chunk(3, dim=-1)
            q, k, v = (heads(part, config["vit_n_heads"]) for part in parts)
            scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            x = x + linear((scores @ v).transpose(-3, -2).flatten(-2), f"{block}.attn.out_proj")
            hidden = F.gelu(linear(normed(x, f"{block}.ln2"), f"{block}.mlp.fc1"), approximate="tanh")
            x = x + linear(hidden, f"{block}.mlp.fc2")
        x = normed(x, "vision_encoder.layer_norm")
        r, side = config["mp_pixel_shuffle_factor"], math.isqrt(x.shape[1])
        x = x.unflatten(1, (side // r, r, side // r, r)).permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2)
        return linear(x, "MP.proj")

    def rotated(x):
        angles = torch.arange(x.shape[-2])[:, None] * torch.from_numpy(frequencies(config))
        cos, sin = (torch.cat([part(angles)] * 2, dim=-1) for part in (torch.cos, torch.sin))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    with torch.no_grad():
        tokens = torch.from_numpy(np.asarray(ids))
        x = w["decoder.token_embedding.weight"][tokens].clone()
        if len(tiles):
            x[tokens == IMAGE] = encode(torch.from_numpy(tiles)).flatten(0, 1)
        future = torch.full((len(ids), len(ids)), -math.inf).triu(1)
        for n in range(config["lm_n_blocks"]):
            block = f"decoder.blocks.{n}"
            y = root_normed(x, f"{block}.norm1")
            q = rotated(heads(linear(y, f"{block}.attn.q_proj"), config["lm_n_heads"]))
            k = rotated(heads(linear(y, f"{block}.attn.k_proj"), config["lm_n_kv_heads"]))
            v = heads(linear(y, f"{block}.attn.v_proj"), config["lm_n_kv_heads"])
            k, v = (part.repeat_interleave(config["lm_n_heads"] // config["lm_n_kv_heads"], dim=0) for part in (k, v))
            scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + future).softmax(-1)
            x = x + linear((scores @ v).transpose(-3, -2).flatten(-2), f"{block}.attn.out_proj")
            y = root_normed(x, f"{block}.norm2")
            gated = F.silu(linear(y, f"{block}.mlp.gate_proj")) * linear(y, f"{block}.mlp.up_proj")
            x = x + linear(gated, f"{block}.mlp.down_proj")
        return linear(root_normed(x, "decoder.norm"), "decoder.head").numpy()


def cut(picture, config: dict, whole: bool) -> tuple[np.ndarray, tuple[int, int]]:
    """A Pillow image as tiles (n, 3, T, T) of 0 to 1, the whole picture first, and the grid's rows and columns."""
    import torch
    from PIL import Image

    tile, longest = config["vit_img_size"], config["max_img_size"]
    width, height = picture.size
    long = max(width, height)
    side = longest if config["resize_to_max_side_len"] else min(longest, math.ceil(long / tile) * tile)
    short = max(math.ceil(min(width, height) * (side / long) / tile) * tile, tile)
    size = (side, short) if width >= height else (short, side)
    x = torch.from_numpy(np.array(picture.resize(size, Image.Resampling.BICUBIC))).permute(2, 0, 1)[None] / 255
    rows, cols = size[1] // tile, size[0] // tile
    tiles = x[0].unflatten(1, (rows, tile)).unflatten(3, (cols, tile)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    if whole and (rows, cols) != (1, 1):
        overview = torch.nn.functional.interpolate(x, (tile, tile), mode="bilinear", antialias=True, align_corners=False)
        tiles = torch.cat([overview, tiles])
    return tiles.numpy(), (rows, cols)


def words(grids: list[tuple[int, int]], length: int, whole: bool) -> str:
    """The text that stands for pictures."""
    text = ""
    for number, (rows, cols) in enumerate(grids):
        text += f"<image: {number}>" if len(grids) > 1 else ""
        if whole:
            text += "<|global_image|>" + "<|image|>" * length
            if rows == cols == 1:
                continue
        for row in range(rows):
            for col in range(cols):
                text += f"<row_{row + 1}_col_{col + 1}>" + "<|image|>" * length
    return text
