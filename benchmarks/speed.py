"""Decode, prefill and encoder of the 256M on the CPU in float32, beside transformers: ours, theirs, and the floor.

    python benchmarks/speed.py [--runs 5] [--steps 12] [--only decode encoder] [--one-core] [--skip-reference]

Random weights in the published shape, written with `save_hf` and read by both sides; what they answer is compared before
anything is timed. Each side lives in a process of its own, which sleeps while the other works: the two libraries' thread
pools disturb each other inside one process. The sides take turns, `--runs` times, after one round to warm up; medians.

transformers runs with sdpa attention, under `torch.inference_mode`, with its `DynamicCache`, cut back to the prompt before
each round. Ours is `model.apply` under jit with the cache donated. Decoding is greedy, `--steps` tokens a round, one call
a token. The floor is the matrix products of the case alone, what XLA's own products cost with nothing around them: those with
the weights, and, except in decoding, attention's, one head at a time.

On a machine that is busy with other things two threads of either side wait for each other, and wall time says little:
`--one-core` gives each side one core and counts the processor's seconds instead.
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Client

import numpy as np

NAME = "SmolVLM-256M-Instruct"
TOLERANCE = 1e-3  # of the largest answer: thirty layers of float32, summed in another order


@dataclass(frozen=True)
class Case:
    """One thing to measure: `batch` rows or tiles, `tokens` of prompt, a cache of `length` columns when decoding."""

    kind: str  # decode, prefill, packed or encoder
    batch: int
    tokens: int = 0
    length: int = 0
    wanted: float | None = None

    def __str__(self):
        if self.kind == "encoder":
            return f"encoder, {self.batch} tile{'s' * (self.batch > 1)}"
        if self.kind == "decode":
            return f"decode, {self.batch} × {self.length}"
        return f"{self.kind}, {self.batch} × {self.tokens}"

    @property
    def ids(self) -> np.ndarray:
        return np.random.default_rng(0).integers(3, 49000, (1 if self.kind == "decode" else self.batch, self.tokens))

    @property
    def next_ids(self) -> np.ndarray:
        return np.random.default_rng(1).integers(3, 49000, (self.batch, 1))

    @property
    def tiles(self) -> np.ndarray:
        return np.random.default_rng(2).integers(1, 256, (self.batch, 512, 512, 3), dtype=np.uint8)

    @property
    def segments(self) -> np.ndarray:
        """Four prompts in a row."""
        return np.repeat(np.arange(1, 5), self.tokens // 4)[None]


CASES = (
    Case("decode", 1, 1000, 1024, 1.2),
    Case("decode", 8, 1000, 1024, 1.15),
    Case("decode", 16, 232, 256),
    Case("decode", 64, 232, 256),
    Case("prefill", 1, 512, wanted=0.9),
    Case("prefill", 1, 1024, wanted=0.9),
    Case("packed", 1, 512),
    Case("encoder", 1, wanted=0.9),
    Case("encoder", 4, wanted=0.9),
)


class Ours:
    def __init__(self, directory: str, steps: int):
        import jax

        from smolvlm_jax import load

        self.jax, self.steps = jax, steps
        self.model, params = load(directory)
        self.variables = {"params": jax.block_until_ready(params)}
        self.about = f"jax {jax.__version__}, {len(os.sched_getaffinity(0))} thread(s)"

        @functools.partial(jax.jit, donate_argnums=1)
        def step(variables, cache, ids):
            out = self.model.apply(variables, input_ids=ids, past_key_values=cache)
            logits = out.logits[:, -1]
            return logits.argmax(-1)[:, None].astype(ids.dtype), logits, out.past_key_values

        self.step = step
        self.prefill = jax.jit(
            lambda v, length, **inputs: self.model.apply(v, **inputs, logits_to_keep=1, cache_length=length),
            static_argnums=1,
        )
        self.encode = jax.jit(lambda v, tiles: self.model.apply(v, tiles, method="get_image_features")[0])

    def prepare(self, case: Case) -> np.ndarray:
        """Get ready, and answer once."""
        jnp = self.jax.numpy
        if case.kind == "encoder":
            tiles = jnp.asarray(case.tiles)
            self.work = lambda: self.encode(self.variables, tiles)
            return np.asarray(self.work())
        ids = jnp.asarray(case.ids, jnp.int32)
        if case.kind == "decode":
            cache = self.prefill(self.variables, case.length, input_ids=ids).past_key_values
            widen = lambda x: jnp.repeat(x, case.batch, axis=0) if x.ndim else x
            self.cache = self.jax.tree.map(widen, cache)
            self.start = np.asarray(self.cache.visible), np.asarray(self.cache.index)
            self.next = jnp.asarray(case.next_ids, jnp.int32)
            _, logits, self.cache = self.step(self.variables, self.cache, self.next)
            self.work = self._decode
            return np.asarray(logits)
        inputs = {"input_ids": ids}
        if case.kind == "packed":
            inputs["segment_ids"] = jnp.asarray(case.segments, jnp.int32)
        self.work = lambda: self.prefill(self.variables, case.tokens + 64, **inputs).logits
        return np.asarray(self.work())

    def _decode(self):
        from dataclasses import replace

        visible, index = map(self.jax.numpy.asarray, self.start)
        self.cache = replace(self.cache, visible=visible.copy(), index=index.copy())
        ids = self.next
        for _ in range(self.steps):
            ids, _, self.cache = self.step(self.variables, self.cache, ids)
        return ids

    def time(self, case: Case) -> float:
        work = lambda: self.jax.block_until_ready(self.work())
        return _clock(work) / (self.steps if case.kind == "decode" else 1)

    def floor(self, case: Case, runs: int) -> float:
        """Seconds of the case's matrix products, median; large ones are reduced to a number, so that none is kept."""
        from smolvlm_jax.parameters import flatten_params

        jax, jnp = self.jax, self.jax.numpy
        vision = case.kind == "encoder"
        config = self.model.config.vision_config if vision else self.model.config.text_config
        side, width, size = "vision_model/" if vision else "text_model/layers_", config.hidden_size, config.head_dim
        flat = flatten_params(self.variables["params"])
        # Matrices alone: not the patches' filters, which have four dimensions.
        kernels = [x for path, x in flat.items() if side in path and path.endswith("kernel") and x.ndim < 4]
        tokens = 1024 if vision else 1 if case.kind == "decode" else case.tokens
        columns = case.length or tokens
        heads = config.num_attention_heads
        shared = heads if vision else config.num_key_value_heads
        rng = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
        hidden = {d: draw(case.batch * tokens, d) for d in (width, config.intermediate_size)}
        q, weights = draw(case.batch * heads, tokens, size), draw(case.batch * heads, tokens, columns)
        keys = [draw(case.batch * shared, columns, size) for _ in range(config.num_hidden_layers)]

        def attend(k):
            one = lambda i: (q[i] @ k[i * shared // heads].T).max() + (weights[i] @ k[i * shared // heads]).max()
            return jax.lax.map(one, jnp.arange(len(q))).max()

        @jax.jit
        def products(kernels, head, keys, hidden, q, weights):
            found = [] if tokens == 1 else [attend(k) for k in keys]
            for kernel in kernels:
                # Heads stand first in the output projections, last in the others: (n, h, d) and (d, n, h).
                matrix = kernel.reshape(width, -1) if kernel.shape[0] == width else kernel.reshape(-1, width)
                y = hidden[matrix.shape[0]] @ matrix
                found.append(y if tokens == 1 else y.max())
            if not vision:  # logits of one position a row
                found.append(hidden[width][: case.batch] @ head)
            return found

        work = functools.partial(products, kernels, flat["lm_head/kernel"], keys, hidden, q, weights)
        return statistics.median([_clock(lambda: jax.block_until_ready(work())) for _ in range(runs + 1)][1:])


class Theirs:
    def __init__(self, directory: str, steps: int, threads: int):
        warnings.simplefilter("ignore")
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.torch, self.steps = torch, steps
        load = transformers.AutoModelForImageTextToText.from_pretrained
        self.model = load(directory, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.cache_class = transformers.DynamicCache
        self.about = f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"

    def prepare(self, case: Case) -> np.ndarray:
        torch = self.torch
        with torch.inference_mode():
            if case.kind == "encoder":
                # Exactly what our encoder makes of the bytes, in the reference's layout.
                values = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
                pixels = ((values - np.float32(0.5)) / np.float32(0.5))[case.tiles]
                pixels = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))[None]
                self.work = lambda: torch.cat(list(self.model.model.get_image_features(pixels).pooler_output))
                return self.work().reshape(case.batch, -1, self.model.config.text_config.hidden_size).numpy()
            ids = torch.from_numpy(case.ids)
            if case.kind == "decode":
                self.cache = self.cache_class(config=self.model.config.text_config)
                self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
                self.cache.batch_repeat_interleave(case.batch)
                self.next = torch.from_numpy(case.next_ids)
                logits = self.model(input_ids=self.next, past_key_values=self.cache, use_cache=True).logits[:, -1]
                self.work = lambda: self._decode(case)
                return logits.numpy()
            inputs = {"input_ids": ids}
            if case.kind == "packed":
                segments = torch.from_numpy(case.segments)
                mask = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
                positions = torch.arange(case.tokens)[None] % (case.tokens // 4)
                inputs |= {"attention_mask": mask, "position_ids": positions}
            self.work = lambda: self.model(**inputs, use_cache=True, logits_to_keep=1).logits
            return self.work().numpy()

    def _decode(self, case: Case):
        self.cache.crop(case.tokens - self.cache.get_seq_length())  # negative: that many off the end
        ids = self.next
        for _ in range(self.steps):
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
        return ids

    def time(self, case: Case) -> float:
        with self.torch.inference_mode():
            return _clock(self.work) / (self.steps if case.kind == "decode" else 1)


def _clock(work) -> float:
    now = time.process_time if len(os.sched_getaffinity(0)) == 1 else time.perf_counter
    begun = now()
    work()
    return now() - begun


def serve(pipe, side, arguments):
    """A side in its process, on the cores it inherited: answers one request after another, and sleeps between them."""
    worker = side(*arguments)
    pipe.send(worker.about)
    with contextlib.suppress(EOFError):  # the parent has finished
        while True:
            method, *rest = pipe.recv()
            pipe.send(getattr(worker, method)(*rest))


class Child:
    def __init__(self, side, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, side, arguments), daemon=True)
        self.process.start()
        other.close()
        self.about = self.pipe.recv()

    def ask(self, *request):
        self.pipe.send(request)
        return self.pipe.recv()


def make_checkpoint(directory: str) -> None:
    from smolvlm_jax import SmolVLMForConditionalGeneration, init_params, published_config, save_hf

    model = SmolVLMForConditionalGeneration(published_config(NAME))
    save_hf(directory, model, init_params(model), force=True)


def measure(case: Case, ours: Child, theirs: Child | None, runs: int) -> float | None:
    """One line of the table; returns how many times as fast as theirs ours is."""
    answer = ours.ask("prepare", case)
    if theirs is not None:
        expected = theirs.ask("prepare", case)
        error = np.abs(answer - expected).max() / np.abs(expected).max()
        if not error <= TOLERANCE:
            raise SystemExit(f"{case}: the two sides disagree by {error:.1e} of the largest answer")
    seconds = {"ours": [], "theirs": []}
    for run in range(runs + 1):
        for name, child in (("ours", ours), ("theirs", theirs)):
            if child is not None:
                spent = child.ask("time", case)
                seconds[name] += [spent] if run else []
    mine = statistics.median(seconds["ours"])
    floor = ours.ask("floor", case, runs)
    line = f"{case!s:<20} ours {1000 * mine:8.1f} ms  floor {1000 * floor:8.1f} ms"
    ratio = None
    if theirs is not None:
        peer = statistics.median(seconds["theirs"])
        ratio = peer / mine
        line += f"  transformers {1000 * peer:8.1f} ms  {ratio:5.2f} ×"
        line += f" (wanted: {case.wanted} ×)" if case.wanted else ""
        line += f"  difference {error:.0e}"
    print(line, flush=True)
    return ratio


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="tokens decoded in a round (at most 24)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="cases whose name begins so: 'decode, 8'")
    parser.add_argument("--one-core", action="store_true")
    parser.add_argument("--skip-reference", action="store_true")
    parser.add_argument("--checkpoint", help="keep the random weights here, or find them here")
    parser.add_argument("--serve", metavar="ADDRESS", help=argparse.SUPPRESS)  # our side alone, for compare.py
    options = parser.parse_args()
    if not 1 <= options.steps <= 24:
        parser.error("--steps: 1 to 24, the columns that the caches have left")
    if options.serve:
        serve(Client(options.serve), Ours, (options.checkpoint, options.steps))
        return
    if options.one_core:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the children inherit it
    # Read by jax in every child.
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.checkpoint or os.path.join(scratch, "model")
        if not os.path.exists(os.path.join(directory, "config.json")):
            maker = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(directory,))
            maker.start()
            maker.join()
            if maker.exitcode:
                raise SystemExit(f"could not write the weights to {directory}")
        ours = Child(Ours, directory, options.steps)
        theirs = None
        if not options.skip_reference:
            theirs = Child(Theirs, directory, options.steps, len(os.sched_getaffinity(0)))
        clock = "processor's seconds" if options.one_core else "wall time"
        print(f"{NAME}, random weights, float32; {options.runs} runs, medians of {clock}")
        print(f"{ours.about}; {theirs.about if theirs else 'no reference'}", flush=True)
        for case in CASES:
            if any(str(case).startswith(word) for word in options.only):
                measure(case, ours, theirs, options.runs)


if __name__ == "__main__":
    sys.exit(main())
