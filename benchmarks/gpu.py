"""Everything that costs time on one GPU, in one command: ours, transformers, and vLLM where it is installed.

    python benchmarks/gpu.py                        # the 256M's shape with random weights, bfloat16
    python benchmarks/gpu.py --model 500m --only decode train
    python benchmarks/gpu.py --model DIR            # a checkpoint with its processor's files: vLLM takes part in the job too
    python benchmarks/gpu.py --model tiny           # the bundled checkpoint, also on a CPU: whether everything runs

Rows: the encoder by tiles, a prompt's prefill by tokens, decoding by rows (with `--columns` columns, half of them the prompt),
a ragged job of text and pictures of 13 tiles (`batch.py`), a training step (`train.py`). Ours are the engine's own programs.
transformers runs with sdpa; its decoding is `generate` with a static cache, which it compiles on a GPU. vLLM decodes with its
defaults. A step of theirs is (the time of n tokens − that of one) / (n − 1).

The share of the peak is that of the formulas' matrix products, the share of the bandwidth that of weights and visible columns,
both of what `smolvlm_jax/plan/chips.py` says of the card; an unknown card has none. Sides run one after the other, each in a
process that has the card alone; medians of `--runs` after one that is not counted.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
PARTS = ("encoder", "prefill", "decode", "job", "train")
PICTURE = (2048, 1536)  # 4:3, which stock settings make 12 tiles and a small one of


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="256m", help="256m, 500m, 2.2b (random weights), a directory or a bundled name")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--tiles", type=int, nargs="+", help="that the encoder takes at once (default: 1 16 64)")
    parser.add_argument("--prompts", type=int, nargs="+", help="tokens of prefill (default: 512 2048)")
    parser.add_argument("--rows", type=int, nargs="+", help="that decode together (default: 1 8 64 256)")
    parser.add_argument("--columns", type=int, help="of a row's cache (default: 2048)")
    parser.add_argument("--steps", type=int, help="tokens of a timed decoding (default: 64)")
    parser.add_argument("--records", type=int, help="of the ragged job (default: 200)")
    parser.add_argument("--runs", type=int, help="(default: 5)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="(default: bfloat16; on CPU float32)")
    parser.add_argument("--skip-reference", action="store_true", help="ours alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure of the programs: encoder, prefill, decode")
    parser.add_argument("--side", choices=("ours", "transformers", "vllm"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.json and not options.json.resolve().parent.is_dir():  # now, not at the end of a rented hour
        parser.error(f"--json {options.json}: there is no such directory")
    small = options.model == "tiny"  # a check that everything runs
    usual: dict[str, Any] = {
        "tiles": [1, 4] if small else [1, 16, 64],
        "prompts": [64] if small else [512, 2048],
        "rows": [1, 2] if small else [1, 8, 64, 256],
        "columns": 128 if small else 2048,
        "steps": 16 if small else 64,
        "records": 6 if small else 200,
        "runs": 2 if small else 5,
    }
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.steps * (options.runs + 1) > options.columns // 2:
        parser.error("--steps times --runs and one more must fit half of --columns: the prompt takes the other half")
    return options


def full_name(model: str) -> str:
    from smolvlm_jax.plan.settings import SHORT_NAMES

    return SHORT_NAMES.get(model, model)


def median(work: Callable[[], Any], runs: int) -> float:
    """Seconds of a run, the first left out."""
    seconds = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def words(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(10, 200, shape, dtype=np.int32)


# ---- ours: the engine's programs


class Ours:
    def __init__(self, options: argparse.Namespace):
        import jax

        from smolvlm_jax import load, make_mesh
        from smolvlm_jax.attention.dispatch import try_kernels
        from smolvlm_jax.parameters import laid_out
        from smolvlm_jax.plan.target import chip_here

        self.options, self.jax = options, jax
        # The devices of a mesh, so that it is one card even where there are several.
        self.mesh = make_mesh(devices=jax.devices()[:1])
        self.model, params = load(options.folder / "hf", dtype=options.dtype, mesh=self.mesh)
        try_kernels()
        self.params, self.chip = laid_out(params), chip_here()
        self.about = f"jax {jax.__version__} on {jax.devices()[0].device_kind}"

    def _programs(self, **config) -> Any:
        from smolvlm_jax.engine import EngineConfig
        from smolvlm_jax.engine.compiled import Programs

        shapes = EngineConfig(**config).resolve(self.model, self.mesh)
        return Programs(self.model, self.params, shapes, self.mesh)

    def _row(self, programs: Any, key: tuple, *arguments: Any, moved: float = 0) -> dict[str, float]:
        """Seconds of a program that returns what replaces the second of its arguments if it was donated, and its shares."""
        from smolvlm_jax.plan.flops import flops
        from smolvlm_jax.sharding import activate

        function, _, donated = programs.parts(*key)
        program, held = programs.get(*key), list(arguments)

        def work():
            out = self.jax.block_until_ready(program(*held))
            if donated:
                held[donated[0]] = out[0] if isinstance(out, tuple) else out

        with activate(self.mesh):
            products = flops(function, *arguments)
        return {"seconds": median(work, self.options.runs), "flops": products, "bytes": moved}

    def encoder(self, tiles: int) -> dict[str, float]:
        c = self.model.config
        side, most = c.vision_config.image_size, 1 << max(tiles - 1, 0).bit_length()
        programs = self._programs(encoder_tiles=most, feature_places=2 * most)
        pixels = np.random.default_rng(0).integers(1, 256, (most, side, side, 3), dtype=np.uint8)
        places = np.arange(most, dtype=np.int32)
        return self._row(programs, ("encode", most), self.params, programs.get("pool")(), pixels, places)

    def prefill(self, tokens: int) -> dict[str, float]:
        from smolvlm_jax.decoding import RowSettings
        from smolvlm_jax.engine.programs import Packed, PackedTokens
        from smolvlm_jax.generation_config import Sampling, SamplingParams

        programs = self._programs(ring_lengths=(tokens,), slots=(1,), prefill_tokens=tokens)
        s = programs.segments[tokens]
        ids, places = words((1, tokens)), np.zeros((programs.places(tokens),), np.int32)
        held = PackedTokens(ids, np.ones_like(ids), places, np.asarray(0, np.int32))
        start, length = np.zeros((1, s), np.int32), np.ones((1, s), np.int32)
        length[0, 0] = tokens
        settings = RowSettings.of([(SamplingParams(max_new_tokens=1), Sampling())] * s)
        settings = self.jax.tree.map(lambda x: x.reshape(1, s), settings)
        pool = programs.get("pool")()
        return self._row(programs, ("prefill", tokens), self.params, pool, Packed(held, start, length, settings))

    def decode(self, rows: int) -> dict[str, float]:
        """A step of rows whose caches hold a prompt."""
        from dataclasses import replace

        jnp, length, steps = self.jax.numpy, self.options.columns, self.options.steps
        programs = self._programs(ring_lengths=(length,), slots=(rows,), chunk=steps)
        state, prompt = programs.get("ring", length)(), length // 2
        visible = jnp.broadcast_to(jnp.arange(length) < prompt, (rows, length))
        placed = lambda old, new: self.jax.device_put(jnp.asarray(new, old.dtype), old.sharding)
        settings = replace(state.rows.settings, limit=placed(state.rows.settings.limit, jnp.full((rows,), 2**30)))
        here = placed(state.rows.position, jnp.full((rows,), prompt))
        live = replace(state.rows, finished=placed(state.rows.finished, jnp.zeros((rows,))), position=here, settings=settings)
        settings = replace(settings, ignore_eos=placed(settings.ignore_eos, jnp.ones((rows,))))
        cache = replace(state.cache, visible=placed(state.cache.visible, visible), index=placed(state.cache.index, prompt))
        state = replace(state, rows=replace(live, settings=settings), cache=cache)
        text = self.model.config.text_config
        itemsize = jnp.dtype(self.model.dtype).itemsize
        layers = self.params["model"]["text_model"]
        head = self.params.get("lm_head", layers["embed_tokens"])
        read = [x for name, part in layers.items() if name.startswith("layers_") for x in self.jax.tree.leaves(part)]
        weights = sum(x.nbytes for x in [*read, *self.jax.tree.leaves(head)])
        seen = prompt + steps * (self.options.runs + 1) / 2  # every run goes on where the last one ended
        columns = 2 * rows * seen * text.num_key_value_heads * text.head_dim * text.num_hidden_layers * itemsize
        found = self._row(programs, ("decode", length, True), self.params, state, np.asarray(steps, np.int32))
        # `flops` counts the loop's body once.
        return {"seconds": found["seconds"] / steps, "flops": found["flops"], "bytes": weights + columns}


# ---- the others


class Transformers:
    def __init__(self, options: argparse.Namespace):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.options, self.torch = options, torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, options.dtype)
        load = transformers.AutoModelForImageTextToText.from_pretrained
        self.model = load(options.folder / "hf", dtype=dtype, attn_implementation="sdpa").eval().to(self.device)
        self.model.generation_config.eos_token_id = None  # lengths are forced
        self.about = f"transformers {transformers.__version__}, torch {torch.__version__} on {self.device}"

    def _median(self, work: Callable[[], Any]) -> float:
        def whole():
            with self.torch.inference_mode():
                work()
            if self.device == "cuda":
                self.torch.cuda.synchronize()

        return median(whole, self.options.runs)

    def _ids(self, rows: int, tokens: int) -> Any:
        return self.torch.from_numpy(words((rows, tokens)).astype(np.int64)).to(self.device)

    def encoder(self, tiles: int) -> dict[str, float]:
        side = self.model.config.vision_config.image_size
        pixels = self.torch.rand(1, tiles, 3, side, side, device=self.device, dtype=self.model.dtype) * 2 - 1
        return {"seconds": self._median(lambda: self.model.model.get_image_features(pixels))}

    def prefill(self, tokens: int) -> dict[str, float]:
        ids = self._ids(1, tokens)
        return {"seconds": self._median(lambda: self.model(input_ids=ids, use_cache=True, logits_to_keep=1))}

    def decode(self, rows: int) -> dict[str, float]:
        steps, ids = self.options.steps, self._ids(rows, self.options.columns // 2)
        seconds = []
        for new in (1, 1 + steps):
            limits = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
            work = lambda limits=limits: self.model.generate(input_ids=ids, cache_implementation="static", **limits)
            seconds.append(self._median(work))
        return {"seconds": (seconds[1] - seconds[0]) / steps}


class VLLM:
    """Text, and where the checkpoint has a processor the job with pictures; its encoder cannot be asked alone."""

    def __init__(self, options: argparse.Namespace):
        import vllm

        self.options, self.vllm = options, vllm
        longest = max(options.columns, *options.prompts) + 64
        self.llm = vllm.LLM(str(options.folder / "hf"), dtype=options.dtype, max_model_len=longest)
        self.about = f"vllm {vllm.__version__}"

    def _run(self, prompts: list[Any], new: list[int]) -> None:
        each = [self.vllm.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in new]
        self.llm.generate(prompts, each, use_tqdm=False)

    def _tokens(self, rows: int, tokens: int, new: int) -> float:
        """The prompts differ in every run, so that none is found in the cache of prefixes."""
        rng = np.random.default_rng(0)
        make = lambda: [{"prompt_token_ids": rng.integers(10, 200, tokens).tolist()} for _ in range(rows)]
        return median(lambda: self._run(make(), [new] * rows), self.options.runs)

    def prefill(self, tokens: int) -> dict[str, float]:
        return {"seconds": self._tokens(1, tokens, 1)}

    def decode(self, rows: int) -> dict[str, float]:
        steps, prompt = self.options.steps, self.options.columns // 2
        return {"seconds": (self._tokens(rows, prompt, 1 + steps) - self._tokens(rows, prompt, 1)) / steps}

    def job(self, records: int) -> dict[str, float]:
        """Half of the records with a picture of 13 tiles, 5 to 150 new tokens: what `batch.py` runs."""
        from PIL import Image

        rng = np.random.default_rng(0)
        prompts: list[Any] = []
        for index in range(records):
            text = "<|im_start|>User:" + "<image>" * (index % 2) + "Describe it.<end_of_utterance>\nAssistant:"
            noise = rng.integers(0, 256, (PICTURE[1] // 8, PICTURE[0] // 8, 3), dtype=np.uint8)
            picture = {"multi_modal_data": {"image": Image.fromarray(noise).resize(PICTURE)}} if index % 2 else {}
            prompts.append({"prompt": text, **picture})
        new = rng.integers(5, 151, records).tolist()
        begin = time.perf_counter()
        self._run(prompts, new)
        return {"seconds": time.perf_counter() - begin}


SIDES = {"ours": Ours, "transformers": Transformers, "vllm": VLLM}


def serve(options: argparse.Namespace) -> None:
    """One side in its process: every row that it can measure, into a file."""
    side = SIDES[options.side](options)
    found: dict[str, Any] = {"about": side.about, "rows": {}}
    chip = getattr(side, "chip", None)
    found["chip"] = None if chip is None else {"flops": chip.flops, "bandwidth": chip.bandwidth}
    sizes = {"encoder": options.tiles, "prefill": options.prompts, "decode": options.rows}
    if (options.folder / "hf" / "preprocessor_config.json").exists():
        sizes["job"] = [options.records]
    for part, each in sizes.items():
        if part in options.only and hasattr(side, part):
            for size in each:
                try:
                    found["rows"][f"{part} {size}"] = getattr(side, part)(size)
                except Exception as error:  # the other rows can be measured all the same
                    found["rows"][f"{part} {size}"] = {"error": f"{type(error).__name__}: {error}"[:300]}
                print(f"  {options.side}: {part} {size}", file=sys.stderr, flush=True)
    (options.folder / f"{options.side}.json").write_text(json.dumps(found))


# ---- the whole


def show(name: str, found: dict[str, Any]) -> str:
    """One row: the time of each side, ours as shares of the card, and how many times as fast it is."""
    ours = found["ours"]["rows"].get(name, {})
    line, seconds = f"{name:<16}", ours.get("seconds")
    for side, result in found.items():
        row = result["rows"].get(name)
        if row is not None:
            line += f"  {side} " + (f"{1000 * row['seconds']:9.3f} ms" if "seconds" in row else row["error"])
            if side != "ours" and seconds and "seconds" in row:
                line += f" ({row['seconds'] / seconds:.2f} ×)"
    if seconds and (chip := found["ours"]["chip"]):
        line += f"  {ours['flops'] / seconds / chip['flops']:.1%} of the peak"
        line += f", {ours['bytes'] / seconds / chip['bandwidth']:.1%} of the bandwidth" if ours["bytes"] else ""
    return line


def script(name: str, *words: Any) -> int:
    """Run another benchmark of this directory, which prints its own table."""
    print(f"\n{name}", flush=True)
    return subprocess.run([sys.executable, HERE / name, *map(str, words)], check=False).returncode


def default_dtype() -> str:
    """What the model computes in here; asked in a process of its own, since one that has asked holds the card's memory."""
    code = "from smolvlm_jax.precision import default_dtype as d; import numpy; print(numpy.dtype(d()).name)"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def make_checkpoint(model: str, folder: Path) -> None:
    from argparse import Namespace

    import batch

    from smolvlm_jax.errors import SmolVLMError

    try:
        batch.prepare_weights(Namespace(model=full_name(model)), folder)
    except SmolVLMError as error:
        raise SystemExit(f"gpu.py: --model {model}: {error}") from error


def main() -> int:
    options = arguments()
    if options.side:
        serve(options)
        return 0
    dtype = options.dtype or default_dtype()
    sides = [
        "ours",
        *(name for name in ("transformers", "vllm") if importlib.util.find_spec(name) and not options.skip_reference),
    ]
    failed, found = 0, {}
    with tempfile.TemporaryDirectory() as name:
        if set(options.only) & {"encoder", "prefill", "decode"}:
            make = f"import gpu, pathlib; gpu.make_checkpoint({options.model!r}, pathlib.Path({name!r}))"
            if subprocess.run([sys.executable, "-c", make], cwd=HERE, check=False).returncode:
                return 2
            for side in sides:
                same = [word for word in sys.argv[1:] if word != "--skip-reference"]
                words = [*same, "--dtype", dtype, "--side", side, "--folder", name]
                failed += subprocess.run([sys.executable, __file__, *words], check=False).returncode != 0
                result = Path(name) / f"{side}.json"
                if result.exists():
                    found[side] = json.loads(result.read_text())
    if found:
        print(f"{full_name(options.model)}, {dtype}; " + "; ".join(result["about"] for result in found.values()))
        print(f"decode: a step with {options.columns:,} columns, half of them a prompt; medians of {options.runs} runs")
        for row in dict.fromkeys(name for result in found.values() for name in result["rows"]):
            print(show(row, found), flush=True)
        failed += any("error" in row for row in found.get("ours", {"rows": {}})["rows"].values())
    if options.json:
        figures = {"model": full_name(options.model), "dtype": dtype, "sides": found}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    alone = ["--skip-reference"] if options.skip_reference else []
    if "job" in options.only:
        peer = ["--peer-cache", "static", "--peer-batch", 32] if dtype == "bfloat16" else []
        shape = ["--model", full_name(options.model), "--records", options.records, "--tiles", 13, "--dtype", dtype]
        failed += script("batch.py", *shape, *peer, *alone) != 0
    if "train" in options.only:
        rows, length, tiles = (2, 64, 1) if options.model == "tiny" else (8, 2048, 13)
        shape = ["--rows", rows, "--length", length, "--tiles", tiles]
        alone = ["--alone"] if options.skip_reference else []
        failed += script("train.py", "--size", full_name(options.model), "--dtype", dtype, *shape, *alone) != 0
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
