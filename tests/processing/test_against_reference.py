"""The image processor against transformers' PIL one, beyond the golden cases: every mode, dtype, layout and option."""

import itertools
import random
import warnings

import numpy as np
import pytest
from PIL import Image

from smolvlm_jax.errors import InputError
from smolvlm_jax.processing import SmolVLMImageProcessor

from .conftest import hash_img, tri_img

transformers = pytest.importorskip("transformers", reason="compares with transformers 5.23")
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")
Reference = transformers.SmolVLMImageProcessorPil


def both(images, settings, **options):
    """(reference's answer or None, ours or None); None where it is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = Reference(**settings)(images, return_row_col_info=True, return_tensors="np", **options)
        except Exception:
            theirs = None
    try:
        ours = SmolVLMImageProcessor(**settings)(images, return_row_col_info=True, return_tensors="np", **options)
    except InputError:
        ours = None
    return theirs, ours


def assert_same(images, settings, note="", **options):
    theirs, ours = both(images, settings, **options)
    assert (theirs is None) == (ours is None), (note, settings, options)
    if theirs is None:
        return False
    a, b = theirs["pixel_values"], ours["pixel_values"]
    assert a.dtype == b.dtype and a.shape == b.shape, (note, settings, options)
    pairs = zip(a, b, strict=True) if a.dtype == object else [(a, b)]
    # of a sample without pictures the reference keeps no shape at all
    assert all(len(x) == len(y) == 0 or np.array_equal(x, y) for x, y in pairs), (note, settings, options)
    assert ("pixel_attention_mask" in theirs) == ("pixel_attention_mask" in ours)
    if "pixel_attention_mask" in theirs:
        assert np.array_equal(theirs["pixel_attention_mask"], ours["pixel_attention_mask"])
    assert (theirs["rows"], theirs["cols"]) == (ours["rows"], ours["cols"])
    return True


def pictures(height, width, seed):
    """One picture of every kind the reference knows, name → picture."""
    rng = np.random.default_rng(seed)
    base = hash_img(height, width) if seed % 2 else tri_img(height, width)
    alpha = rng.integers(0, 256, (height, width, 1), dtype=np.uint8)
    rgb, rgba = Image.fromarray(base), Image.fromarray(np.dstack([base, alpha]))
    la = Image.fromarray(np.dstack([base[..., :1], alpha]))
    key, trns, table = rgb.copy(), rgb.quantize(16), rgb.quantize(16)
    key.info["transparency"] = tuple(int(v) for v in base[0, 0])
    trns.info["transparency"] = 3
    table.info["transparency"] = bytes(range(0, 256, 16))
    out = {mode: rgb.convert(mode) for mode in ("RGB", "RGBX", "L", "1", "CMYK", "YCbCr", "HSV")}
    out |= {"RGBA": rgba, "LA": la, "PA": la.convert("PA"), "P": rgb.quantize(16), "P key": trns, "P table": table}
    out |= {"LAB": Image.merge("LAB", rgb.split()), "RGB key": key}
    out |= {
        "I;16": Image.fromarray(base[..., 0].astype(np.uint16) * 257),
        "I;16 small": Image.fromarray(base[..., 0].astype(np.uint16)),
    }
    out |= {"I": Image.fromarray(base[..., 0].astype(np.int32)), "F": Image.fromarray(base[..., 0].astype(np.float32))}
    out |= {"hwc": base, "chw": base.transpose(2, 0, 1), "hw1": base[..., :1], "1hw": base[None, ..., 0]}
    out |= {"hwc4": np.dstack([base, alpha]), "chw4": np.dstack([base, alpha]).transpose(2, 0, 1)}
    out |= {str(t): base.astype(t) for t in ("uint16", "int32", "int64", "float16", "float32", "float64")}
    out |= {
        "fractions": base / np.float32(255),
        "fractions 64": base / 255,
        "noughts and ones": (base > 127).astype(np.float32),
    }
    out |= {"fractions alpha": (np.dstack([base, alpha]) / 255).astype(np.float32), "bool": base > 127}
    out |= {"negative": base.astype(np.float32) - 1, "above": base.astype(np.int64) + 9, "between": base * 0.999}
    out |= {"bare": base[..., 0], "two channels": base[..., :2], "five": np.dstack([base, base[..., :2]])}
    return out


SMALL = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}
SHAPES = [(9, 21), (30, 40), (1, 1), (3, 40), (4, 4), (1, 33), (57, 3)]


@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_every_kind_of_picture(seed):
    """Every kind of input: same pixels, or an error where the reference has one."""
    options = [{}, {"do_rescale": False}, {"do_rescale": False, "do_normalize": False}, {"do_image_splitting": False}]
    accepted = 0
    for name, picture in pictures(*SHAPES[seed], seed).items():
        for option in options:
            accepted += assert_same(picture, SMALL, name, **option)
    assert accepted > 100


def test_do_convert_rgb_off():
    for name, picture in pictures(20, 30, 1).items():
        for option in ({"do_normalize": False}, {"image_mean": 0.5, "image_std": 0.5}, {}):
            assert_same(picture, SMALL, name, do_convert_rgb=False, **option)


def test_option_matrix():
    """Splitting × resizing × padding × nesting × size forms × filters."""
    one, two, three = (Image.fromarray(hash_img(*shape)) for shape in ((30, 40), (16, 200), (90, 15)))
    nestings = [one, [one, two], [[one], [two, three]], [[one, two], []], [[one], [one]]]
    sizes = [{"longest_edge": 64}, {"longest_edge": 50}, {"longest_edge": 10}, {"height": 40, "width": 70}]
    seen = 0
    for split, resize, pad, images, size in itertools.product((True, False), (True, False), (True, False), nestings, sizes):
        settings = {"size": size, "max_image_size": {"longest_edge": 16}}
        options = {"do_image_splitting": split, "do_resize": resize, "do_pad": pad, "resample": seen % 6}
        seen += assert_same(images, settings, str(images), **options)
    assert seen == 160


def test_thirty_aspect_ratios():
    """Every tile, and the global view on its own, at the sizes of both published families (a quarter of them)."""
    for number in range(30):
        ratio = 0.03 * 1.28**number
        height, width = (round(90 / ratio), 90) if ratio > 1 else (90, max(1, round(90 * ratio)))
        image = Image.fromarray(hash_img(max(height, 1), width))
        for size, tile in ((512, 128), (384, 96)):
            settings = {"size": {"longest_edge": size}, "max_image_size": {"longest_edge": tile}}
            assert assert_same(image, settings, (height, width))


def test_random_batches():
    rng = random.Random(0)
    for number in range(120):
        edge, tile = rng.choice([(64, 16), (60, 16), (16, 16), (12, 16), (33, 11), (39, 13), (100, 20)])
        kinds = [
            list(pictures(rng.randint(1, 60), rng.randint(1, 60), number + n).values())[:30] for n in range(rng.choice([1, 2]))
        ]
        images = [[rng.choice(kind) for _ in range(rng.choice([1, 2]))] for kind in kinds]
        options = {}
        if rng.random() < 0.3:
            options["do_image_splitting"] = False
        if rng.random() < 0.3:
            options["do_resize"] = False
        if rng.random() < 0.3:
            options.update(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
        if rng.random() < 0.2:
            options["rescale_factor"] = 1 / 127.5
        assert_same(images, {"size": {"longest_edge": edge}, "max_image_size": {"longest_edge": tile}}, number, **options)


@pytest.mark.parametrize("number", [1, 2])
def test_unsplit_counts(number):
    """An unsplit picture is one tile, though get_number_of_image_patches says 0 as the reference's does."""
    settings = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    ours, theirs = SmolVLMImageProcessor(**settings), Reference(**settings)
    off = {"do_image_splitting": False}
    assert ours.get_number_of_image_patches(480, 640, off) == theirs.get_number_of_image_patches(480, 640, off) == (0, 0, 0)
    assert ours.plan(480, 640, **off).num_tiles == 1
    image = Image.fromarray(tri_img(48, 64))
    assert ours([image] * number, do_image_splitting=False, pixel_format="uint8")["num_tiles"] == number


def test_patch_numbers():
    settings = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    ours, theirs = SmolVLMImageProcessor(**settings), Reference(**settings)
    rng = random.Random(1)
    for _ in range(500):
        height, width = rng.randint(1, 5000), rng.randint(1, 5000)
        middle = {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}}
        for override in ({}, {"size": {"longest_edge": 1024}}, middle):
            assert ours.get_number_of_image_patches(height, width, override) == theirs.get_number_of_image_patches(
                height, width, override
            )
    assert ours.get_number_of_image_patches(480, 640) == (13, 3, 4)
