"""One training step beside torch's, in one run: tokens a second, the ratio, and how far the losses are apart.

    python benchmarks/train.py                          # 256M shape, float32 on the CPU, 2 rows of 512 tokens, text only
    python benchmarks/train.py --tiles 1                # with a tile a row
    python benchmarks/train.py --size SmolVLM-Instruct --dtype bfloat16 --rows 8 --length 2048    # on a GPU

Both train everything with AdamW from the same random weights; torch runs transformers' model eagerly with sdpa attention. Steps
alternate, after two of each that are not counted (memory settles by then); the medians are compared. The floor is the
arithmetic: model FLOP a step.
"""

import argparse
import os
import statistics
import time

PEAK = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}  # bfloat16, dense


def flops_of_step(config, rows: int, length: int, tiles: int) -> float:
    """Model FLOP of a step: 6 per parameter and token in matrix products, and those of attention; no recomputation."""
    text, vision = config.text_config, config.vision_config
    h, n = text.head_dim, text.num_attention_heads
    layer = text.hidden_size * h * (2 * n + 2 * text.num_key_value_heads) + 3 * text.hidden_size * text.intermediate_size
    tokens = rows * length
    products = 6 * tokens * (text.num_hidden_layers * layer + text.hidden_size * text.vocab_size)
    attention = 12 * tokens * length / 2 * n * h * text.num_hidden_layers
    d, patches = vision.hidden_size, vision.num_patches
    encoder = vision.num_hidden_layers * (4 * d * d + 2 * d * vision.intermediate_size)
    per_tile = 6 * patches * encoder + 12 * patches * patches * d * vision.num_hidden_layers
    return products + attention + rows * tiles * per_tile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="SmolVLM-256M-Instruct", help="a published size, a directory or a bundled name")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tiles", type=int, default=0, help="of each row")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default=None, help="what to compute in (default: bfloat16, on CPU float32)")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--layers", type=int, default=None, help="fewer text layers, for a quick look")
    parser.add_argument("--alone", action="store_true", help="without torch")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from smolvlm_jax.train.malloc import keep_freed_memory

    keep_freed_memory()  # as `smolvlm-jax train` does; torch's allocations gain by it too

    import jax
    import numpy as np

    from smolvlm_jax import SmolVLMConfig, init_params, make_mesh, published_config, resolve
    from smolvlm_jax.model import SmolVLMForConditionalGeneration
    from smolvlm_jax.precision import default_dtype
    from smolvlm_jax.sizes import PUBLISHED
    from smolvlm_jax.train.config import TrainConfig
    from smolvlm_jax.train.partition import Partition
    from smolvlm_jax.train.state import create_state, state_shardings
    from smolvlm_jax.train.step import make_step

    name = options.size
    config = published_config(name) if name in PUBLISHED else SmolVLMConfig.from_pretrained(resolve(name))
    if options.layers:
        config = config.replace(text_config=config.text_config.replace(num_hidden_layers=options.layers))
    dtype = options.dtype or np.dtype(default_dtype()).name
    model = SmolVLMForConditionalGeneration(config, dtype=np.dtype(dtype) if dtype == "float32" else jax.numpy.bfloat16)
    model = model.clone(remat=options.remat)
    rng = np.random.default_rng(0)
    words = min(1000, config.text_config.vocab_size, config.image_token_id)
    ids = rng.integers(10, words, (options.rows, options.length)).astype(np.int32)
    batch = {"labels": ids.copy()}
    side = config.vision_config.image_size
    if options.tiles:
        slots = options.tiles * config.image_seq_len
        ids[:, 5 : 5 + slots] = config.image_token_id
        batch["labels"][:, 5 : 5 + slots] = -100
        batch["pixel_values"] = rng.integers(0, 256, (options.rows, options.tiles, side, side, 3), np.uint8)
        batch["tile_mask"] = np.ones((options.rows, options.tiles), bool)
    batch["input_ids"] = ids
    training = TrainConfig(steps=100, learning_rate=1e-4, warmup_steps=0, schedule="constant", clip_norm=1e9)
    mesh, partition = make_mesh(devices=jax.devices()[:1]), Partition.of(model, training)
    params = init_params(model, 0, mesh=mesh)
    peer = None if options.alone else torch_step(options, config, params, batch, dtype, jax.default_backend() != "cpu")
    shardings = state_shardings(partition, mesh)
    state = jax.jit(lambda p: create_state(p, partition), out_shardings=shardings, donate_argnums=0)(params)
    step = make_step(model, partition, mesh)

    def ours():
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    started = time.perf_counter()
    first = ours()
    print(
        f"{options.size}, {dtype}, {options.rows} × {options.length} tokens, {options.tiles} tiles a row, remat {options.remat}"
    )
    print(f"first step with compilation {time.perf_counter() - started:.1f} s, loss {first:.6f}")
    if peer is not None:
        theirs = peer()
        print(f"torch's loss {theirs:.6f}, apart {abs(theirs - first) / theirs:.1e}")
    for fn in (ours, peer):
        if fn is not None:
            fn()
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(options.steps):
        for name, fn in (("ours", ours), ("torch", peer)):
            if fn is not None:
                started = time.perf_counter()
                fn()
                seconds[name].append(time.perf_counter() - started)
    flops, tokens = flops_of_step(config, options.rows, options.length, options.tiles), options.rows * options.length
    for name, values in seconds.items():
        if values:
            median = statistics.median(values)
            print(
                f"{name}: {median:.3f} s a step ({', '.join(f'{v:.3f}' for v in values)}), {tokens / median:,.0f} tokens/s, "
                f"{flops / median / 1e12:.2f} TFLOP/s" + utilisation(flops / median, jax.devices()[0].device_kind)
            )
    if peer is not None:
        print(f"ratio: {statistics.median(seconds['torch']) / statistics.median(seconds['ours']):.2f} ×")


def utilisation(rate: float, kind: str) -> str:
    peak = next((value for name, value in PEAK.items() if kind.startswith(name)), None)
    return "" if peak is None else f", model FLOP utilisation {rate / peak:.1%}"


def torch_step(options, config, params, batch, dtype: str, accelerated: bool):
    """transformers' model with our weights and torch's AdamW: a function that takes one step and returns its loss."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from smolvlm_jax.convert.rules import rearrange, torch_name
    from smolvlm_jax.parameters import flatten_params

    theirs = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config.to_dict()), attn_implementation="sdpa")
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for path, leaf in flatten_params(params).items():
            name, pattern = torch_name(path)
            tensor = named[name]
            filled = np.empty(tuple(tensor.shape), np.float32)
            rearrange(filled, pattern, leaf.shape)[...] = np.asarray(leaf)
            tensor.copy_(torch.from_numpy(filled))
    device = "cuda" if accelerated and torch.cuda.is_available() else "cpu"
    theirs = theirs.to(device).train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.0)
    inputs = {name: torch.tensor(batch[name].astype(np.int64), device=device) for name in ("input_ids", "labels")}
    if "pixel_values" in batch:
        tiles = np.einsum("bnhwc->bnchw", batch["pixel_values"]).astype(np.float32) / 127.5 - 1
        inputs["pixel_values"] = torch.tensor(tiles, device=device)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = theirs(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    main()
