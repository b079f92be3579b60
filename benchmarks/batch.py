"""What the engine answers per hour beside transformers' `generate()`, from the same weights, prompts and limits.

    python benchmarks/batch.py                     # the 256M's shape with random weights: 200 records, on CPU some 10 minutes
    python benchmarks/batch.py --model tiny        # the bundled checkpoint, where all tokens have to be equal
    python benchmarks/batch.py --tiles 0 1 3 5 9 13 17 --dtype bfloat16 --peer-batch 32      # for a GPU

A ragged workload: half of the records are text alone, the others carry a picture of one of `--tiles` tiles; each has its own
number of new tokens between `--new-tokens`, and stop tokens do not count, so that both sides draw exactly as many. transformers
gets them in batches, padded on the left, each of which ends with its longest row, as its documentation shows. Prompts are made
beforehand for both, programs are compiled beforehand, and each side runs in a process of its own with all cores.

Then every token is compared. Random weights have near-ties: where the first difference falls on a place at which the
reference's own two best logits lie within 1e-3 of the logits' spread, nobody can say which of them is right.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="SmolVLM-256M-Instruct", help="a published size (random weights), or a directory or bundled name"
    )
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1])
    parser.add_argument("--new-tokens", type=int, nargs=2, default=(5, 150), metavar=("LEAST", "MOST"))
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(10, 40), metavar=("LEAST", "MOST"), help="of words")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--peer-batch", type=int, default=8)
    parser.add_argument("--peer-cache", default=None, help="transformers' cache_implementation, e.g. static")
    parser.add_argument("--slots", type=int, nargs="+", default=None)
    parser.add_argument("--ring-lengths", type=int, nargs="+", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-reference", action="store_true", help="measure our side alone")
    parser.add_argument("--side", choices=("ours", "peer", "check"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def workload(options, config) -> list[dict]:
    """Records: ids int32 (t,), tiles uint8 (n, T, T, 3), limit."""
    rng = np.random.default_rng(options.seed)
    size, image = config.vision_config.image_size, config.image_token_id
    words = min(config.text_config.vocab_size, image) - 1
    records = []
    for index in range(options.records):
        count = int(rng.choice(options.tiles)) if index % 2 else 0
        text = rng.integers(10, words, int(rng.integers(options.prompt_tokens[0], options.prompt_tokens[1] + 1)))
        ids = [1]
        for _ in range(count):  # a word stands where a tile's row and column markers would
            ids += [9, *[image] * config.image_seq_len]
        ids += text.tolist()
        tiles = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        low, high = options.new_tokens
        records.append({"ids": np.asarray(ids, np.int32), "tiles": tiles, "limit": int(rng.integers(low, high + 1))})
    return records


# ---- ours


def ours(options) -> None:
    from smolvlm_jax import load
    from smolvlm_jax.engine import Engine, EngineConfig, Prepared, Request, SamplingParams
    from smolvlm_jax.engine.counters import Counters
    from smolvlm_jax.engine.requests import tile_digests

    class Words:
        decode = staticmethod(lambda ids, **_: " ".join(map(str, ids)))

    model, params = load(options.folder / "hf", dtype=options.dtype)
    chosen = {name: tuple(v) for name in ("slots", "ring_lengths") if (v := getattr(options, name))}
    engine = Engine(model, params, Words(), EngineConfig(**chosen))
    begin = time.perf_counter()
    engine.warm_up()
    warm = time.perf_counter() - begin
    requests = []
    for index, r in enumerate(workload(options, model.config)):
        prepared = Prepared(r["ids"], r["tiles"], tile_digests(r["tiles"]))
        sampling = SamplingParams(max_new_tokens=r["limit"], ignore_eos=True, repetition_window=0)
        requests.append(Request(index, prepared=prepared, params=sampling))
    touch = [Request(i, prepared=Prepared(r.prepared.input_ids, 255 - r.prepared.tiles, tile_digests(255 - r.prepared.tiles)),
                     params=SamplingParams(2, ignore_eos=True)) for i, r in enumerate(requests[:2])]  # fmt: skip
    list(engine.generate(touch))  # memory is there, and none of the pictures is known
    engine.stats = Counters()
    begin = time.perf_counter()
    results = list(engine.generate(requests))
    seconds = time.perf_counter() - begin
    assert not any(r.error for r in results), next(r.error for r in results if r.error)
    summary = engine.summary()
    out = {
        "seconds": seconds,
        "decode_seconds": summary["decode_seconds"],
        "warm_up_seconds": warm,
        "tokens": {r.id: r.token_ids for r in results},
        "summary": summary,
        "slots": engine.config.slots,
        "ring_lengths": engine.config.ring_lengths,
    }
    (options.folder / "ours.json").write_text(json.dumps(out))


# ---- the peer


def reference(options):
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        options.folder / "hf", dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    )
    model.generation_config.eos_token_id = None  # lengths are forced
    return torch, transformers, model.eval().to(device), device


def float_pixels(tiles: np.ndarray) -> np.ndarray:
    """uint8 (n, T, T, 3) -> the reference's layout and values, float32 (n, 3, T, T)."""
    scaled = tiles.astype(np.float32) * np.float32(1 / 255)
    return np.ascontiguousarray(((scaled - np.float32(0.5)) / np.float32(0.5)).transpose(0, 3, 1, 2))


def peer_inputs(torch, records: list[dict], size: int, device, dtype) -> dict:
    """A batch padded on the left; pictures padded to the most of any row, all zeros being no picture."""
    longest, most = max(len(r["ids"]) for r in records), max(len(r["tiles"]) for r in records)
    ids, mask = np.zeros((len(records), longest), np.int64), np.zeros((len(records), longest), np.int64)
    pixels = np.zeros((len(records), most, 3, size, size), np.float32)
    for row, r in enumerate(records):
        ids[row, longest - len(r["ids"]) :], mask[row, longest - len(r["ids"]) :] = r["ids"], 1
        if len(r["tiles"]):
            pixels[row, : len(r["tiles"])] = float_pixels(r["tiles"])
    inputs = {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}
    if most:
        inputs["pixel_values"] = torch.from_numpy(pixels).to(device, dtype)
    return inputs


def peer(options) -> None:
    torch, transformers, model, device = reference(options)
    config = model.config
    records = workload(options, _config(options))
    size = config.vision_config.image_size
    first_token: list[float] = []

    class Clock(transformers.LogitsProcessor):
        """Notes when the first token of a batch can be drawn: what comes after is decoding."""

        def __call__(self, input_ids, scores):
            if not first_token:
                if device == "cuda":
                    torch.cuda.synchronize()
                first_token.append(time.perf_counter())
            return scores

    def run(batch: list[dict]) -> tuple[np.ndarray, float, float]:
        inputs = peer_inputs(torch, batch, size, device, model.dtype)
        new = max(r["limit"] for r in batch)
        first_token.clear()
        begin = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                max_new_tokens=new,
                pad_token_id=0,
                do_sample=False,
                logits_processor=[Clock()],
                **({"cache_implementation": options.peer_cache} if options.peer_cache else {}),
            )
        out = out[:, inputs["input_ids"].shape[1] :].cpu().numpy()
        end = time.perf_counter()
        assert out.shape[1] == new, "the peer stopped early"
        return out, end - begin, end - first_token[0]

    run([{**r, "limit": 2} for r in records[:2]])  # warm
    total = decode = 0.0
    tokens = {}
    for start in range(0, len(records), options.peer_batch):
        batch = records[start : start + options.peer_batch]
        out, seconds, decoding = run(batch)
        total, decode = total + seconds, decode + decoding
        for row, r in enumerate(batch):
            tokens[start + row] = out[row, : r["limit"]].tolist()
    out = {"seconds": total, "decode_seconds": decode, "tokens": tokens, "threads": torch.get_num_threads()}
    (options.folder / "peer.json").write_text(json.dumps(out))


def check(options) -> None:
    """Where tokens differ for the first time, how close the reference's two best logits are, as a share of their spread."""
    torch, _, model, device = reference(options)
    records = workload(options, _config(options))
    ours_, peer_ = (json.loads((options.folder / f"{side}.json").read_text())["tokens"] for side in ("ours", "peer"))
    gaps = {}
    for key, want in peer_.items():
        got = ours_[key]
        if got == want:
            continue
        at = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
        record = records[int(key)]
        record = {**record, "ids": np.concatenate([record["ids"], np.asarray(want[:at], np.int32)])}
        with torch.inference_mode():
            inputs = peer_inputs(torch, [record], model.config.vision_config.image_size, device, model.dtype)
            logits = model(**inputs).logits[0, -1].float()
        best = logits.topk(2).values
        gaps[key] = {"position": at, "gap": float((best[0] - best[1]) / (logits.max() - logits.min()))}
    (options.folder / "gaps.json").write_text(json.dumps(gaps))


# ---- both


def _config(options):
    from smolvlm_jax import SmolVLMConfig

    return SmolVLMConfig.from_pretrained(options.folder / "hf")


def prepare_weights(options, folder: Path) -> None:
    from smolvlm_jax import SmolVLMForConditionalGeneration, init_params, load, published_config, resolve, save_hf
    from smolvlm_jax.errors import SmolVLMError

    try:
        model = SmolVLMForConditionalGeneration(published_config(options.model))
        params = init_params(model, seed=0)
    except (SmolVLMError, KeyError):
        model, params = load(resolve(options.model))
    save_hf(folder / "hf", model, params)


def main() -> int:
    options = arguments()
    if options.side:
        {"ours": ours, "peer": peer, "check": check}[options.side](options)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_weights(options, folder)
        sides = ("ours",) if options.skip_reference else ("ours", "peer", "check")
        for side in sides:
            print(f"{side} …", file=sys.stderr, flush=True)
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", name], check=True)
        mine, *reference = (json.loads((folder / f"{n}.json").read_text()) for n in ("ours", "peer", "gaps")[: len(sides)])
    s, records = mine["summary"], options.records
    counts = f"{s['prompt_tokens']} prompt tokens, {s['tiles']} tiles, {s['new_tokens']} new tokens"
    print(f"{options.model}, {options.dtype}: {records} records, {counts}")
    print(f"rings {mine['ring_lengths']} columns × {mine['slots']} slots; the peer's batches hold {options.peer_batch}")
    print(f"{'':24}{'ours':>10}{'transformers':>14}{'ratio':>8}")
    for name, figure in [
        ("records/hour", lambda x: 3600 * records / x["seconds"]),
        ("tiles/s", lambda x: s["tiles"] / x["seconds"]),
        ("new tokens/s", lambda x: s["new_tokens"] / x["seconds"]),
        ("decode alone, tokens/s", lambda x: (s["new_tokens"] - records) / x["decode_seconds"]),
    ]:
        a, *peers = (figure(side) for side in (mine, *reference[:1]))
        print(f"{name:24}{a:10.1f}" + "".join(f"{b:14.1f}{a / b if b else float('nan'):8.2f}" for b in peers))
    shares = ("prefill_padding_share", "encoder_padding_share", "decode_padding_share", "live_cache_share", "device_idle_share")
    print("; ".join(f"{name.replace('_', ' ')} {s[name]:.1%}" for name in shares))
    print(f"warm-up {mine['warm_up_seconds']:.0f} s for {s['compilations']} programs")
    if not reference:
        return 0
    gaps = reference[1]
    equal = records - len(gaps)
    print(f"identical to the last token: {equal} of {records} ({equal / records:.1%})")
    for key, where in sorted(gaps.items(), key=lambda item: int(item[0])):
        verdict = "a near-tie" if where["gap"] < 1e-3 else "A DIFFERENCE"
        print(f"  record {key} from new token {where['position']} on: top-2 gap {where['gap']:.1e} of the spread: {verdict}")
    return int(any(where["gap"] >= 1e-3 for where in gaps.values()))


if __name__ == "__main__":
    raise SystemExit(main())
