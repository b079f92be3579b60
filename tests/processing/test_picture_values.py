"""Pictures are read as a viewer shows them, in whatever form they come, or a notice says what is not."""

import base64
import io
import struct

import numpy as np
import pytest
from PIL import Image

from smolvlm_jax.errors import InputError, MediaError
from smolvlm_jax.processing import MediaLimits, SmolVLMImageProcessor
from smolvlm_jax.processing import notices as said
from smolvlm_jax.processing.fetch import image_size, load_image

from .conftest import tri_img

PICTURE = tri_img(32, 32)

GREY = tri_img(24, 32)[..., 0]


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def forms(content, tmp_path):
    """The forms in which a caller may give a file."""
    path = tmp_path / "picture.dat"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    return [path, str(path), content, text, f"data:image/png;base64,{text}", Image.open(io.BytesIO(content))]


@pytest.fixture
def images():
    return SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_resize=False)


@pytest.fixture
def notices(monkeypatch, caplog):
    monkeypatch.setattr(said, "_said", set())
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_16_bits_in_every_form(kind, tmp_path, small):
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    wanted = small(Image.fromarray(GREY), pixel_format="uint8")["pixel_values"]
    arrays = [(GREY.astype(np.uint16) * 257)[..., None], (GREY.astype(">u2") * 257)[None]]
    for form in (*forms(encoded(deep, kind), tmp_path), *arrays):
        found = small(form, full_16bit=True, pixel_format="uint8")["pixel_values"]
        assert np.array_equal(found, wanted), f"{kind} as {type(form).__name__}"
    assert small(forms(encoded(deep, kind), tmp_path)[0], pixel_format="uint8")["pixel_values"].mean() > 250  # the reference


@pytest.mark.parametrize(
    ("kind", "count", "value"),
    [
        (2, 2, b"6\0\0\0"),  # text
        (7, 4, b"6\0\0\0"),  # undefined
        (3, 1, struct.pack("<HH", 0, 0)),
        (3, 1, struct.pack("<HH", 99, 0)),
        (4, 1, struct.pack("<I", 2**32 - 1)),
        (99, 1, b"6\0\0\0"),  # no such type
        (2, 2**31, b"\xff\xff\xff\x7f"),  # far outside
    ],
)
def test_an_orientation_that_is_none(kind, count, value):
    """Ignored, as in the reference: the pixels are whole."""
    entry = struct.pack("<HHHI", 1, 0x112, kind, count) + value + bytes(4)
    for exif in (b"Exif\0\0II*\0\x08\0\0\0" + entry, b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        for form in ("JPEG", "WEBP"):
            content = encoded(Image.new("RGB", (40, 20)), form, exif=exif)
            assert load_image(content).size == (40, 20) and image_size(content) == (20, 40)
        shown = SmolVLMImageProcessor(exif_transpose=True, do_image_splitting=False)
        assert shown(Image.open(io.BytesIO(content)))["pixel_values"].shape[1] == 1


def test_pages(tmp_path, processor, notices):
    """The first with a notice, all of them as pictures of their own, or one."""
    pages = [Image.fromarray(np.roll(tri_img(30, 40), 7 * n, 0)) for n in range(3)]
    path = tmp_path / "scan.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    assert np.array_equal(load_image(path), pages[0])
    assert len([text for text in notices() if "scan.tif" in text and "pages='all'" in text]) == 1
    load_image(path), load_image(encoded(pages[0], "TIFF"))
    assert len(notices()) == 1
    images = processor.image_processor
    each = [images(page)["pixel_values"][0] for page in pages]
    for form in forms(path.read_bytes(), tmp_path):
        assert np.array_equal(images(form, pages="all")["pixel_values"][0], np.concatenate(each))
        assert np.array_equal(images(form, pages=2)["pixel_values"][0], each[1])
        with pytest.raises(MediaError, match=r"3 pages.*no page 4"):
            images(form, pages=4)
    for wrong in (0, -1, "some", 1.5, True):
        with pytest.raises(InputError, match="pages is"):
            images(path, pages=wrong)
    assert np.array_equal(images(pages[0], pages=2)["pixel_values"][0], each[0])  # a picture without pages is its only one
    question = [{"role": "user", "content": [{"type": "image", "path": str(path)}, {"type": "text", "text": "Q?"}]}]
    out = processor.apply_chat_template(question, tokenize=True, return_dict=True, return_tensors="np", pages="all")
    assert np.array_equal(out["pixel_values"][0], np.concatenate(each))
    assert processor.count_prompt_tokens(question, pages="all") == [out["input_ids"].shape[1]]
    direct = processor(text="<image><image><image>", images=str(path), pages="all", return_tensors="np")
    assert np.array_equal(direct["pixel_values"], out["pixel_values"])


def test_transparency(tmp_path, notices):
    """By default as the reference, with a notice; over a colour that is asked for, in every form."""
    pixels = np.dstack([tri_img(24, 32), np.tile(np.arange(0, 256, 8, np.uint8), (24, 1))])
    picture = Image.fromarray(pixels)
    alpha = pixels[..., 3:].astype(float) / 255
    assert np.array_equal(load_image(encoded(picture, "PNG")), pixels[..., :3])
    assert len([text for text in notices() if "transparent" in text and "background=" in text]) == 1
    images = SmolVLMImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False)
    for colour, name in (((255, 255, 255), "white"), ((0, 0, 0), "#000000"), ((10, 200, 30), [10, 200, 30])):
        wanted = images(
            np.round(alpha * pixels[..., :3] + (1 - alpha) * np.array(colour)).astype(np.uint8), pixel_format="uint8"
        )
        for form in (*forms(encoded(picture, "PNG"), tmp_path), pixels):
            found = images(form, background=name, pixel_format="uint8")["pixel_values"]
            assert np.abs(found.astype(int) - wanted["pixel_values"]).max() <= 2
    for wrong in ("no colour", (1, 2), (300, 0, 0), 7):
        with pytest.raises(InputError, match="is no colour"):
            images(picture, background=wrong)


def test_animations_and_depth_are_announced(notices):
    frames = [Image.fromarray(np.roll(tri_img(9, 9), n, 0)) for n in range(2)]
    for kind in ("GIF", "PNG", "WEBP"):
        said._said.clear()
        assert load_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:])).size == (9, 9)
        assert "animated" in notices()[-1]
    load_image(encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"))
    assert "full_16bit=True" in notices()[-1] and len(notices()) == 4
    load_image(encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"))
    assert "floating point" in notices()[-1]


@pytest.mark.parametrize("rest", [b",", b",\0\0\0\0", b"!\xf9\4\0"])
def test_damage_behind_the_first_frame_does_not_matter(rest, notices):
    """Whether or not it was looked for a second frame, which is done until one was announced."""
    whole = encoded(Image.fromarray(tri_img(9, 9)), "GIF")
    assert np.array_equal(load_image(whole[:-1] + rest), load_image(whole))


def test_plain_pictures_give_no_notice(notices):
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "JPEG"):
        load_image(encoded(Image.fromarray(tri_img(9, 9)), kind))
    load_image(encoded(Image.fromarray(tri_img(9, 9)).convert("RGBA"), "PNG"))
    load_image(encoded(Image.fromarray(tri_img(9, 9)[..., 0].astype(np.uint16)), "PNG"))
    assert notices() == []


@pytest.mark.parametrize("given", [("a<image>", [PICTURE]), ("a", PICTURE), (["a<image>"], [[PICTURE]]), ("a<image>", "a.png")])
def test_a_prompt_in_the_place_of_pictures(processor, given):
    with pytest.raises(InputError, match=r"images come first, processor\(images, text\), or go by name: processor\(text="):
        processor(*given)


PROSE = ("What?", "What is this", "Read it:\nall of it.", "<image>What", "It is 3.5 m long.", "这是什么？")


@pytest.mark.parametrize("prompt", PROSE)
def test_a_prompt_alone_goes_by_name(processor, tmp_path, monkeypatch, prompt):
    for given in (prompt, [prompt], [[prompt], [PICTURE]]):
        with pytest.raises(InputError, match=r"first argument, is '.*processor\(text=…\)") as caught:
            processor(given)
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match="images come first"):
            processor(given, "a.png")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(tri_img(9, 9)).save(tmp_path / prompt, "PNG")  # the name of a file may read like that
    assert "pixel_values" in processor(prompt)


@pytest.mark.parametrize(
    "name", ["a.png", "photos/my cat.jpeg", "./my photos/cat", "cat", "https://a.b/is this?", f"{'Az09' * 30} "]
)
def test_what_names_a_file_is_looked_for(processor, name):
    with pytest.raises(MediaError):
        processor(name, limits=MediaLimits(urls=False))


@pytest.mark.parametrize(
    ("texts", "images", "words"),
    [
        (["a<image>", "<image>b"], 2, "pass images=[[im1], [im2]]"),
        (["a<image>", "<image>b<image>", "c"], 3, "pass images=[[im1], [im2, im3], []]"),
        (["a", "b"], 2, "pass images=[[im1], [im2]], and write <image> in each text"),
        (["a<image>", "<image>b"], 3, "pass a list of pictures for each text, images=[[…], […]]"),
    ],
)
def test_a_flat_list_of_pictures_for_several_texts(processor, texts, images, words):
    with pytest.raises(InputError) as raised:
        processor(text=texts, images=[PICTURE] * images)
    assert words in str(raised.value)
    with pytest.raises(InputError, match="a text for each of the 2 lists of pictures"):
        processor(text="<image>", images=[[PICTURE], [PICTURE]])
