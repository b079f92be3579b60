"""What preprocessing costs, from decoded Pillow pictures to finished arrays, beside transformers' PIL image processor.

    python benchmarks/preprocess.py [--runs 9] [--skip-reference] [--sizes 640x480 1920x1080 4000x3000]

One thread, one process; the candidates take turns, so that other load on the machine affects all alike; medians. Prints for
each size: the reference, our float32 in its layout, our uint8 tiles, and the lower bound, which is the Pillow resizes alone
that equal results require. Then two threads against one, and the largest memory a picture takes.

The pictures are photos where scikit-image is installed (its astronaut, resized), smooth noise otherwise; both take the same
time, since the time of a resize does not depend on the values.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
import warnings

import numpy as np
from PIL import Image

from smolvlm_jax.processing import SmolVLMImageProcessor

STOCK = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
SIZES = ((640, 480), (1920, 1080), (4000, 3000))


def photo(width: int, height: int) -> Image.Image:
    try:
        from skimage import data

        source = Image.fromarray(data.astronaut())
    except ImportError:
        source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    return source.resize((width, height), Image.Resampling.BICUBIC)


def resizes(image: Image.Image, processor: SmolVLMImageProcessor) -> Image.Image:
    """The Pillow calls that the result depends on, and nothing else."""
    plan = processor.plan(image.height, image.width)
    for height, width in (*plan.sizes, *([(plan.tile, plan.tile)] if plan.rows else [])):
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def in_turn(candidates: dict, runs: int) -> dict[str, float]:
    """Median seconds of each candidate; each round runs all of them, and a first round for warming up is not counted."""
    seconds = {name: [] for name in candidates}
    for run in range(runs + 1):
        for name, work in candidates.items():
            begun = time.perf_counter()
            work()
            if run:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times) for name, times in seconds.items()}


def cost(sizes, runs: int, reference: bool) -> list[dict[str, float]]:
    ours = SmolVLMImageProcessor(**STOCK, num_threads=1)
    theirs = None
    if reference:
        warnings.simplefilter("ignore")
        try:
            import transformers

            transformers.logging.set_verbosity_error()
            theirs = transformers.SmolVLMImageProcessorPil(**STOCK)
            print(f"reference: transformers {transformers.__version__} SmolVLMImageProcessorPil")
        except ImportError as error:
            print(f"no reference: {error}")
    results = []
    for width, height in sizes:
        image = photo(width, height)
        candidates = {
            "resizes": lambda image=image: resizes(image, ours),
            "uint8": lambda image=image: ours(image, pixel_format="uint8"),
            "float32": lambda image=image: ours(image, return_tensors="np"),
        }
        if theirs is not None:
            candidates["reference"] = lambda image=image: theirs(image, return_tensors="np")
        found = in_turn(candidates, runs)
        results.append(found)
        tiles = ours.plan(height, width).num_tiles
        line = f"{width}×{height} ({tiles} tiles)".ljust(24)
        line += "  ".join(f"{name} {1000 * found[name]:6.1f} ms" for name in candidates)
        line += f"  resizes/uint8 {found['resizes'] / found['uint8']:.0%}"
        if theirs is not None:
            line += f"  uint8 {found['reference'] / found['uint8']:.2f}×  float32 {found['reference'] / found['float32']:.2f}×"
        print(line)
    if theirs is not None:
        for name, wanted in (("uint8", 2.2), ("float32", 1.7)):
            ratio = statistics.median(found["reference"] / found[name] for found in results)
            print(f"median ratio, {name}: {ratio:.2f}× the reference's speed (wanted: {wanted}×)")
        bound = statistics.median(found["reference"] / found["resizes"] for found in results)
        print(f"median ratio of the floor, the resizes alone: {bound:.2f}×")
    share = statistics.median(found["resizes"] / found["uint8"] for found in results)
    print(f"median share of the resizes in uint8: {share:.0%} (wanted: 80%)")
    return results


def threads(runs: int, pictures: int = 8) -> float:
    """Speed of two threads over one, on a batch of pictures."""
    batch = [photo(1920, 1080) for _ in range(pictures)]
    processors = {count: SmolVLMImageProcessor(**STOCK, num_threads=count) for count in (1, 2)}
    found = in_turn(
        {str(count): lambda p=processor: p(batch, pixel_format="uint8") for count, processor in processors.items()},
        max(3, runs // 3),
    )
    ratio = found["1"] / found["2"]
    print(f"two threads, {pictures} pictures of 1920×1080: {1000 * found['1']:.0f} → {1000 * found['2']:.0f} ms, {ratio:.2f}×")
    return ratio


def _peak_of(size, answer):
    image = photo(*size)
    processor = SmolVLMImageProcessor(**STOCK, num_threads=1)
    processor(photo(64, 64), pixel_format="uint8")  # so that imports and first allocations are counted before
    before = _current()
    # The high-water mark of a process never falls; writing 5 resets it where the system supports that.
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    out = processor(image, pixel_format="uint8")
    tiles = out["pixel_values"].nbytes
    answer.put((_high_water() - before, tiles))


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def _current() -> int:
    return _status("VmRSS")


def _high_water() -> int:
    try:
        return _status("VmHWM")
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory(sizes) -> list[float]:
    """Largest memory beyond the decoded picture itself, as a share of what is allowed."""
    context = multiprocessing.get_context("spawn")
    shares = []
    for size in sizes:
        answer = context.Queue()
        child = context.Process(target=_peak_of, args=(size, answer))
        child.start()
        peak, tiles = answer.get(timeout=120)
        child.join()
        allowed = 4 * tiles + 4 * size[0] * size[1]
        shares.append(peak / allowed)
        print(
            f"memory, {size[0]}×{size[1]}: {peak / 2**20:.0f} MiB on top of the picture; 4 × its uint8 tiles + 4 bytes a "
            f"pixel are {allowed / 2**20:.0f} MiB ({peak / allowed:.0%})"
        )
    return shares


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--skip-reference", action="store_true")
    parser.add_argument("--sizes", nargs="+", default=None, metavar="WxH")
    options = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes] if options.sizes else SIZES
    import PIL

    print(f"python {sys.version.split()[0]}, numpy {np.__version__}, pillow {PIL.__version__}, {options.runs} runs, medians")
    cost(sizes, options.runs, not options.skip_reference)
    threads(options.runs)
    memory(sizes)


if __name__ == "__main__":
    main()
