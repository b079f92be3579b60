"""What the file of a picture may make Pillow do is bounded, in every format; large honest pictures are read."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from smolvlm_jax.errors import MediaError
from smolvlm_jax.processing.fetch import image_size, load_image
from smolvlm_jax.processing.pixels import reduce_16bit

SECONDS = 8  # on a busy machine; without a bound each of these takes minutes


def saved(form: str, size: tuple[int, int] = (64, 48), mode: str = "RGB", **options) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, form, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png_chunks(before: bool) -> bytes:
    """Millions of empty chunks, before the pixels or among them."""
    data = saved("PNG")
    place = data.index(b"IDAT") - 4
    whole = data[place : data.index(b"IEND") - 4]
    empty = chunk(b"abCd" if before else b"IDAT") * 2_000_000
    return data[:place] + empty + whole + chunk(b"IEND")


def jpeg_segments(segment: bytes, count: int) -> bytes:
    data = saved("JPEG")
    return data[:2] + segment * count + data[2:]


def gif_comments() -> bytes:
    data = saved("GIF", mode="L")
    place = data.index(b",", 13 + 3 * 256 if len(data) > 800 else 13)
    return data[:place] + b"!\xfe" + (b"\x01a") * 6_000_000 + b"\0" + data[place:]


def tiff_strips(count: int) -> bytes:
    """A picture of one row, said to have so many strips."""
    entries = [
        (256, 4, 1, 8),
        (257, 4, 1, count),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        (278, 4, 1, 1),
    ]
    data = 8 + 2 + 12 * (len(entries) + 2) + 4
    entries += [(273, 4, count, data), (279, 4, count, data + 4 * count)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    places = np.full(count, data, "<u4").tobytes() + np.full(count, 8, "<u4").tobytes()
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + directory + bytes(4) + places


def tiff_tags() -> bytes:
    """Pages of 65,535 tags each."""
    tags = b"".join(struct.pack("<HHII", number, 3, 1, 1) for number in range(65_535))
    page, out = 2 + len(tags) + 4, b"II*\0" + struct.pack("<I", 8)
    for number in range(40):
        out += struct.pack("<H", 65_535) + tags + struct.pack("<I", 0 if number == 39 else 8 + page * (number + 1))
    return out


def bmp_rle(size: tuple[int, int] = (64, 64)) -> bytes:
    """Ends of lines, over and over."""
    head = b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024)
    info = struct.pack("<IiiHHIIiiII", 40, *size, 1, 8, 1, 0, 0, 0, 256, 0)
    return head + info + bytes(1024) + b"\0\0" * 15_000_000


def tags(count: int, kind: int, size: int) -> bytes:
    """Tags of which each claims all bytes of the file for itself, and an orientation."""
    entries = [(274, 3, 1, 6)] + [(40_000 + n, kind, size, 8) for n in range(count)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return (b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)).ljust(size + 8, b"\0")


def orientations(count: int) -> bytes:
    return b"II*\0" + struct.pack("<IHHHII", 8, 1, 274, 3, count, 26 if count > 2 else 6) + bytes(4) + b"\6\0" * count


def with_exif(form: str, exif: bytes) -> bytes:
    if form == "PNG text":
        text = b"\nexif\n%d\n" % len(exif) + exif.hex().encode()
        return with_chunk(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)), b"IDAT")
    if form.startswith("PNG"):
        return with_chunk(chunk(b"eXIf", exif), b"IEND" if form == "PNG at its end" else b"IDAT")
    if form == "AVIF":  # Pillow does not write what it cannot read
        data = saved(form, exif=b"Exif\0\0" + tags(1, 7, len(exif)))
        place = data.index(b"II*\0")
        return data[:place] + exif + data[place + len(exif) :]
    return saved(form, exif=b"Exif\0\0" + exif)


def with_chunk(more: bytes, before: bytes) -> bytes:
    data = saved("PNG")
    place = data.index(before) - 4
    return data[:place] + more + data[place:]


HOSTILE = {
    "png before": lambda: png_chunks(True),
    "png among": lambda: png_chunks(False),
    "jpeg segments": lambda: jpeg_segments(b"\xff\xe5\0\2", 5_000_000),
    "jpeg fill": lambda: jpeg_segments(b"\xff", 20_000_000),
    "jpeg exif": lambda: jpeg_segments(b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527), 1500),
    "jpeg markers": lambda: jpeg_segments(b"\xff\xe5\0\2", 50_000)[:-2] + b"\xff\xda\0\2" * 200 + b"\xff\xfe\0\2" * 5_000_000,
    "gif": gif_comments,
    "tiff strips": lambda: tiff_strips(10_000_000),
    "tiff tags": tiff_tags,
    "ppm comment": lambda: b"P6 #" + b"x" * 30_000_000 + b"\n1 1 255 abc",
    "ppm text": lambda: b"P3 4000 4000 255 " + b"1 " * 20_000_000,
    "ppm comments": lambda: b"P3 4000 4000 255\n" + b"#\n" * 3_000_000,
    "bmp runs": lambda: bmp_rle((8000, 8000)),
    "bmp": bmp_rle,
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.thorough) for name in HOSTILE])
def test_a_file_of_small_pieces_is_refused_in_time(name):
    content = HOSTILE[name]()
    for read in (image_size, load_image):
        begin = time.process_time()
        try:
            read(content)
        except MediaError as error:
            assert f"{len(content)} bytes" in str(error)
        else:
            assert read is image_size, "it was read"  # its header may be harmless
        assert time.process_time() - begin < SECONDS


FORMS = ["PNG", "PNG at its end", "PNG text", "WEBP", "AVIF", "JPEG"]


@pytest.mark.parametrize("form", FORMS)
def test_exif_of_millions_of_values_is_not_read(form, monkeypatch):
    """One value after the other would be an object of Python."""
    plain, large = orientations(1), orientations(30_000 if form in ("JPEG", "PNG text") else 300_000)
    if form in ("JPEG", "PNG text"):
        monkeypatch.setattr("smolvlm_jax.processing.effort._MOST_VALUES", 20_000)
    assert form == "AVIF" or load_image(with_exif(form, plain)).size == (48, 64)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Exif, "get", lambda *_: pytest.fail("it was read"))
        for read in (image_size, load_image):
            try:
                found = read(with_exif(form, large))
            except MediaError as error:
                assert form == "AVIF" and "values of the tag 274" in str(error)
            else:
                assert form != "AVIF" and (found if read is image_size else found.size[::-1]) == (48, 64)


@pytest.mark.parametrize("form", ["TIFF", "AVIF"])
def test_tags_that_share_their_bytes_are_refused(form):
    data = tags(400, 7, 100_000) if form == "TIFF" else with_exif(form, tags(400, 7, 100_000))
    with pytest.raises(MediaError, match=r"tags have 40,0\d\d,\d\d\d bytes in all"):
        image_size(data)


@pytest.mark.parametrize("count", [10, 2**17 + 1])
def test_the_number_of_strips_decides(count):
    if count == 10:
        assert load_image(tiff_strips(10)).size == (8, 10)
    else:
        with pytest.raises(MediaError, match=r"131,073 strips or tiles"):
            image_size(tiff_strips(count))


def large(name: str) -> bytes:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (3000, 4000, 3), np.uint8))
    out = io.BytesIO()
    form, options = {
        "png": ("PNG", {"compress_level": 0}),
        "jpeg": ("JPEG", {"quality": 100}),
        "progressive": ("JPEG", {"progressive": True, "exif": b"Exif\0\0II*\0\x08" + bytes(9), "comment": b"x" * 60_000}),
        "tiff rows": ("TIFF", {"tiffinfo": {278: 1}}),
        "tiff deflate": ("TIFF", {"compression": "tiff_adobe_deflate", "tiffinfo": {278: 1}}),
        "ppm": ("PPM", {}),
        "bmp": ("BMP", {}),
        "gif": ("GIF", {}),
    }[name]
    (noise.getchannel(0) if name == "gif" else noise).save(out, form, **options)
    return out.getvalue()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["png", "jpeg", "progressive", "tiff rows", "tiff deflate", "ppm", "bmp", "gif"])
def test_large_honest_pictures_are_read(name):
    assert load_image(large(name)).size == (4000, 3000)


@pytest.mark.parametrize(
    "head", [b"P6 30 20 1000\n", b"P6 30 20 65535\n", b"P5 30 20 1000\n", b"P5 30 20 7\n", b"P6 30 20 254 "]
)
def test_pixels_of_any_depth_are_those_of_pillow(head):
    data = head + np.random.default_rng(1).integers(0, 256, 3600, np.uint8).tobytes()
    pillow = Image.open(io.BytesIO(data))
    pillow.load()
    assert load_image(data).tobytes() == pillow.convert("RGB").tobytes()
    assert load_image(data, full_16bit=True).tobytes() == reduce_16bit(pillow).convert("RGB").tobytes()
    with pytest.raises(MediaError, match="not enough image data"):
        load_image(data[:400])


def test_small_chunks_are_read():
    data = saved("PNG", (900, 900))
    place, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    body = data[place + 8 : end - 4]
    small = b"".join(chunk(b"IDAT", body[n : n + 1]) for n in range(len(body)))
    assert load_image(data[:place] + small + chunk(b"IEND")).size == (900, 900)
