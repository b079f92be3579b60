"""Reads damaged files, in a process of its own that may be killed: kind, backend, first seed, number of files, folder.

Prints a line before and after each file, so that whoever watches knows which one hangs, and at the end how many were
read, how many refused, and the most memory used in megabytes.
"""

import io
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from smolvlm_jax.errors import SmolVLMError
from smolvlm_jax.processing import SmolVLMImageProcessor, SmolVLMVideoProcessor, isolation

PICTURES = ("png", "jpeg", "webp", "gif", "tiff")
VIDEOS = ("mp4", "avi")


def sound_file(kind: str, rng: random.Random, folder: Path) -> bytes:
    """A whole file of `kind`, in one of its flavours."""
    if kind in VIDEOS:
        return rng.choice([path.read_bytes() for path in sorted(folder.glob(f"*.{kind}"))])
    height, width = rng.randint(1, 90), rng.randint(1, 90)
    pixels = np.frombuffer(rng.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
    image = Image.fromarray(pixels if rng.random() < 0.5 else pixels // 32 * 4)
    options = {}
    if kind == "png":
        image = image.convert(rng.choice(["RGB", "RGBA", "L", "P", "1", "LA", "I;16"]) if rng.random() < 0.8 else "RGB")
    elif kind == "jpeg":
        image = image.convert(rng.choice(["RGB", "L", "CMYK"]))
        options = {"progressive": rng.random() < 0.5}
    elif kind == "webp":
        options = {"lossless": rng.random() < 0.5}
    elif kind == "gif":
        image = image.convert("P")
    elif kind == "tiff":
        image = image.convert(rng.choice(["RGB", "L", "CMYK", "RGBA", "1", "P"]))
        options = {"compression": rng.choice(["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])}
    if kind in ("gif", "webp", "png") and rng.random() < 0.3:
        options.update(save_all=True, append_images=[image.copy(), image.copy()])
    if kind in ("jpeg", "png", "webp") and rng.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = rng.randint(0, 9)
        options["exif"] = exif
    out = io.BytesIO()
    image.save(out, kind.upper(), **options)
    return out.getvalue()


def damage(content: bytes, rng: random.Random) -> bytes:
    """Truncated, bit-flipped, partly overwritten, doubled up, or random altogether."""
    content = bytearray(content)
    how = rng.choice(["truncate", "flip", "flip", "flip head", "overwrite", "insert", "random", "random after head"])
    if how == "truncate":
        return bytes(content[: rng.randrange(len(content))])
    if how.startswith("flip"):
        reach = min(len(content), 256) if how == "flip head" else len(content)
        for _ in range(rng.choice([1, 2, 5, 20, 100])):
            content[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    elif how == "overwrite":
        place = rng.randrange(len(content))
        content[place : place + rng.randrange(1, 200)] = rng.choice([b"\0", b"\xff", b"\x7f"]) * rng.randrange(1, 200)
    elif how == "insert":
        place = rng.randrange(len(content))
        content[place:place] = rng.randbytes(rng.randrange(1, 200))
    elif how == "random":
        return rng.randbytes(rng.randrange(2000))
    else:
        keep = rng.randrange(4, 64)
        content[keep:] = rng.randbytes(max(0, len(content) - keep))
    return bytes(content)


def main(kind: str, backend: str, first: int, count: int, folder: Path):
    images = SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, num_threads=1)
    sampling = {"fps": 2, "max_frames": 4, "video_size": {"longest_edge": 32}}
    videos = SmolVLMVideoProcessor(max_image_size={"longest_edge": 32}, video_sampling=sampling, backend=backend)
    videos.num_threads = 1
    read = refused = 0
    slowest = 0.0
    for seed in range(first, first + count):
        rng = random.Random(f"{kind} {seed}")
        content = damage(sound_file(kind, rng, folder), rng)
        # half of the extensions are wrong
        path = folder / f"damaged-{kind}-{backend}.{rng.choice([kind, 'jpg', 'mp4', 'txt'])}"
        path.write_bytes(content)
        print(f"start {seed}", flush=True)
        begun = time.perf_counter()
        try:
            if kind in PICTURES:
                out = images(path if rng.random() < 0.5 else content, pixel_format="uint8")
            else:
                out = videos(str(path), do_sample_frames=True, pixel_format="uint8")
            assert out["pixel_values"].dtype == np.uint8 and len(out["pixel_values"]) == out["num_tiles"] >= 1
            read += 1
        except SmolVLMError as error:
            assert str(error)
            refused += 1
        slowest = max(slowest, time.perf_counter() - begun)
        path.unlink()
    isolation.end_helpers()
    peak = max(own_peak(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) // 1024
    print(f"end {read} {refused} {peak} {slowest:.2f}", flush=True)


def own_peak() -> int:
    """Peak resident kilobytes of this process. `ru_maxrss` would start at the size of the one that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
