"""Golden cases G01–G21: pictures, exact to the last bit."""

import numpy as np
import pytest
from PIL import Image

from smolvlm_jax.errors import InputError
from smolvlm_jax.processing import SmolVLMImageProcessor
from smolvlm_jax.processing.geometry import capped_size, longest_edge_size, plan_tiles

from .conftest import hash_img, sha, tri_img

pil = Image.fromarray
SMALL = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}
MIDDLE = {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}}
BIG = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
BASE = tri_img(90, 150)
RAMP = (np.mgrid[0:90, 0:150][1] * 255 // 149).astype(np.uint8)


def assert_golden(expected, images, settings=SMALL, **options):
    def run():
        return SmolVLMImageProcessor(**settings)(images, return_row_col_info=True, return_tensors="np", **options)

    if "error" in expected:
        with pytest.raises(InputError):
            run()
        return None
    out = run()
    pixels = out["pixel_values"]
    wanted = expected["pixel_values"]
    assert (list(pixels.shape), str(pixels.dtype)) == (wanted["shape"], wanted["dtype"])
    assert (out["rows"], out["cols"]) == (expected["rows"], expected["cols"])
    assert sha(pixels) == wanted["sha256"]
    mask = out["pixel_attention_mask"]
    assert mask.dtype == np.int64 and mask.shape == (*pixels.shape[:2], *pixels.shape[3:])
    assert mask.sum((-1, -2)).tolist() == expected["mask_sums"]
    return pixels


def test_geometry(golden):
    for case in golden["G01_geometry"]:
        first = longest_edge_size((case["h"], case["w"]), case["longest"])
        plan = plan_tiles(
            case["h"], case["w"], size={"longest_edge": case["longest"]}, max_image_size={"longest_edge": case["tile"]}
        )
        found = [list(first), list(capped_size(first)), list(plan.sizes[-1]), [plan.rows, plan.cols]]
        assert found == [case["after_longest"], case["after_cap"], case["tiled"], case["rows_cols"]], case


def test_stock_sizes(golden):
    assert_golden(golden["G02_rgb_480x640_2048_512"], pil(tri_img(480, 640)), BIG)
    assert_golden(golden["G03_rgb_640x480_2048_512"], pil(tri_img(640, 480)), BIG)
    assert_golden(golden["G04_rgb_333x777_2048_512_hash"], pil(hash_img(333, 777)), BIG)
    assert_golden(golden["G10_1536_384"]["a"], pil(tri_img(1080, 1920)), MIDDLE)
    assert_golden(golden["G10_1536_384"]["b"], pil(tri_img(600, 450)), MIDDLE)


def test_small_whole_array(golden, golden_arrays):
    pixels = assert_golden(golden["G05_rgb_90x150_64_16_arrays"], pil(BASE))
    assert np.array_equal(pixels, golden_arrays["G05_pixel_values"])


def test_no_splitting(golden, golden_arrays):
    pixels = assert_golden(golden["G06_no_splitting"]["tri"], pil(BASE), do_image_splitting=False)
    assert np.array_equal(pixels, golden_arrays["G06_pixel_values"])
    assert_golden(golden["G06_no_splitting"]["big"], pil(hash_img(200, 300)), BIG, do_image_splitting=False)


def test_no_resize(golden):
    for name, expected in golden["G07_no_resize_splitting"].items():
        height, width = map(int, name.split("x"))
        assert_golden(expected, pil(hash_img(height, width)), do_resize=False)
    both = {"do_resize": False, "do_image_splitting": False}
    assert_golden(golden["G08_no_resize_no_splitting"], pil(hash_img(40, 33)), **both)


def test_extreme_aspects(golden):
    for name, expected in golden["G09_extreme_aspect"].items():
        height, width = map(int, name.split("x"))
        assert_golden(expected, pil(hash_img(height, width)))


def test_filters(golden):
    names = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
    for number, name in enumerate(names):
        assert_golden(golden["G11_other_filters"][name], pil(hash_img(90, 150)), resample=number)


def test_rescale_and_normalize_switches(golden):
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    cases = {
        "no_normalize": {"do_normalize": False},
        "no_rescale": {"do_rescale": False},
        "neither": {"do_rescale": False, "do_normalize": False},
        "imagenet": imagenet,
        "factor_1_127.5": {"rescale_factor": 1 / 127.5},
    }
    for name, options in cases.items():
        expected = golden["G12_rescale_normalize_switches"][name]
        assert_golden(expected, pil(BASE), {**SMALL, **options})
        assert_golden(expected, pil(BASE), **options)


def test_batches(golden):
    two = [[pil(BASE)], [pil(tri_img(16, 200)), pil(tri_img(30, 30))]]
    pixels = assert_golden(golden["G13_batch_padding"]["two"], two)
    assert not pixels[0, 13:].any()
    assert_golden(golden["G13_batch_padding"]["with_empty"], [[], [pil(tri_img(30, 30))]])


def test_grey(golden):
    grey = pil(BASE[..., 0])
    cases = {
        "L": grey,
        "L_rgb": grey.convert("RGB"),
        "HW1": BASE[..., :1],
        "one_HW": BASE[None, ..., 0],
        "HW": BASE[..., 0],
    }
    for name, image in cases.items():
        assert_golden(golden["G14_grayscale"][name], image)


def test_alpha(golden):
    rgba = Image.merge("RGBA", [*pil(BASE).split(), pil(RAMP)])
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    cases = {
        "rgba": rgba,
        "composited_first": Image.alpha_composite(white, rgba).convert("RGB"),
        "dropped_alpha": rgba.convert("RGB"),
    }
    for name, image in cases.items():
        assert_golden(golden["G15_rgba"][name], image)


def test_palettes(golden):
    palette = Image.new("P", (150, 90))
    palette.putdata([int(v) for v in (BASE[..., 0] // 16).ravel()])
    palette.putpalette([int(v) for i in range(16) for v in (i * 16, 255 - i * 15, (i * 37) % 256)])
    transparent = palette.copy()
    transparent.info["transparency"] = 3
    cases = {"P": palette, "P_rgb": palette.convert("RGB"), "P_transparency": transparent}
    for name, image in cases.items():
        assert_golden(golden["G16_palette"][name], image)


def test_other_modes(golden):
    rgb, grey = pil(BASE), pil(BASE[..., 0])
    cases = {
        "LA": grey.convert("LA"),
        "1": grey.point(lambda v: 255 if v > 127 else 0).convert("1"),
        "CMYK": rgb.convert("CMYK"),
        "YCbCr": rgb.convert("YCbCr"),
        "I16": pil(BASE[..., 0].astype(np.uint16) * 257),
        "I16_small": pil(BASE[..., 0].astype(np.uint16)),
        "I": pil(BASE[..., 0].astype(np.int32)),
        "F": pil(BASE[..., 0].astype(np.float32)),
    }
    assert set(cases) == set(golden["G17_other_modes"])
    for name, image in cases.items():
        assert_golden(golden["G17_other_modes"][name], image)


def test_exif(golden, data):
    path = data / "exif6.png"
    with Image.open(path) as image:
        assert_golden(golden["G18_exif_orientation"]["pil"], image)
        turned = SmolVLMImageProcessor(**SMALL)(image, exif_transpose=True)["pixel_values"]
    for source in (str(path), path, path.read_bytes()):
        pixels = assert_golden(golden["G18_exif_orientation"]["path"], source)
        assert np.array_equal(pixels, turned)


def test_arrays(golden):
    cases = {
        "hwc_u8": BASE,
        "chw_u8": BASE.transpose(2, 0, 1).copy(),
        "f32_01": BASE.astype(np.float32) / 255,
        "f32_0_255_int": BASE.astype(np.float32),
        "f32_neg": BASE.astype(np.float32) / 127.5 - 1,
        "f32_nonint": BASE.astype(np.float32) * 0.999,
        "i64": BASE.astype(np.int64),
        "bool": BASE > 127,
        "u16_big": BASE.astype(np.uint16) * 257,
    }
    for name, image in cases.items():
        assert_golden(golden["G19_arrays"][name], image)
    assert_golden(golden["G19_arrays"]["f32_01_no_rescale"], cases["f32_01"], do_rescale=False)


def test_value_table(golden, golden_arrays):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    out = SmolVLMImageProcessor(**SMALL)(pil(ramp), do_resize=False)["pixel_values"]
    table = golden_arrays["G21_u8_to_pixel"]
    assert sha(table) == golden["G21_value_table"]["sha256"]
    assert np.array_equal(out[0, 0].reshape(3, 256), np.stack([table] * 3))
    bits = {0: 0xBF800000, 1: 0xBF7DFDFE, 127: 0xBB808080, 128: 0x3B808100, 200: 0x3F119192, 255: 0x3F800000}
    assert {value: int(table.view(np.uint32)[value]) for value in bits} == bits
