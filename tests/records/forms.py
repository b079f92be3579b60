"""Records in every form that is documented, and generated ones that are not: what each holds, and what reads it.

A form carries words that occur nowhere else and a number of pictures. Whatever reads it has to use all of them, or to refuse
the record with a message that names what is wrong.
"""

import base64
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = ("quail", "zebra", "otter")
FRAMES = 3


@dataclass(frozen=True)
class Form:
    """A record.

    Attributes:
        name: for messages of a failing test.
        record: the record; relative paths start from the folder of the files.
        words: what has to occur in the prompt.
        pictures: how many pictures and frames the model has to see.
        named: words of which the message has to have one where the record is refused; None where it must be used.
        answered: whether it ends with the assistant's turn, so that only training reads it.
    """

    name: str
    record: dict[str, Any]
    words: tuple[str, ...] = (WORDS[0],)
    pictures: int = 0
    named: tuple[str, ...] | None = None
    answered: bool = False
    doors: tuple[str, ...] = field(default=("batch", "ray", "training"))


def write_files(folder: Path) -> None:
    """Pictures p0.png to p3.png, all of one size, and frames of a video."""
    for number in range(4):
        pixels = np.full((20, 30, 3), 40 * number + 20, np.uint8)
        pixels[: 5 * number] = 255
        Image.fromarray(pixels).save(folder / f"p{number}.png")


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def chat(*content: Any) -> dict[str, Any]:
    return {"messages": [turn("user", list(content))]}


def documented(folder: Path) -> Iterator[Form]:
    """Forms of the documentation: each is used."""
    yield from _items(folder)
    yield from _columns(folder)
    yield from _layouts()


def _sources(folder: Path) -> dict[str, Any]:
    data = (folder / "p0.png").read_bytes()
    encoded = base64.b64encode(data).decode()
    return {
        "path": "p0.png",
        "absolute": str(folder / "p0.png"),
        "file URL": f"file://{folder}/p0.png",
        "data URL": f"data:image/png;base64,{encoded}",
        "base64": encoded,
        "bytes": data,
        "bytearray": bytearray(data),
        "struct of bytes": {"bytes": data, "path": None},
        "struct of bytes with a name": {"bytes": data, "path": "elsewhere.png"},
        "struct of a path": {"bytes": None, "path": "p0.png"},
        "struct of a url": {"url": f"file://{folder}/p0.png", "detail": "low"},
        "array": np.asarray(Image.open(folder / "p0.png")),
        "Pillow": Image.open(folder / "p0.png"),
    }


def _items(folder: Path) -> Iterator[Form]:
    question = text(WORDS[0])
    sources = _sources(folder)
    for name, source in sources.items():
        for kind in ("image", "input_image"):
            yield Form(f"{kind} item, {name}", chat({"type": kind, "image": source}, question), pictures=1)
    url = sources["data URL"]
    for item in (
        {"type": "image", "path": "p0.png"},
        {"type": "image", "url": url},
        {"type": "image", "base64": sources["base64"]},
        {"type": "image_url", "image_url": url},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "image", "image": "p0.png", "text": None, "index": None, "url": None},
        {"type": "image", "image": "p0.png", "text": "", "cache_control": {"type": "ephemeral"}},
    ):
        yield Form(f"item {sorted(item)}", chat(item, question), pictures=1)
    for kind in ("text", "input_text", "output_text"):
        yield Form(f"{kind} item", chat({"type": kind, "text": WORDS[0], "image": None, "annotations": []}))
    yield Form("string in a list", chat({"type": "image", "path": "p0.png"}, WORDS[0]), pictures=1)
    yield Form("string", {"messages": [turn("user", WORDS[0])]})
    frames = [f"p{number}.png" for number in range(FRAMES)]
    for name, video in _videos(folder, frames).items():
        for key in ("video", "url", "path") if name == "file" else ("video",):
            yield Form(f"video item, {key}, {name}", chat({"type": "video", key: video}, question), pictures=FRAMES)
    if (folder / "clip.avi").exists():
        file, listed = {"type": "video", "path": str(folder / "clip.avi")}, {"type": "video", "video": frames}
        for one, other in itertools.product((file, listed), repeat=2):
            yield Form(f"videos {one} and {other}", chat(one, other, question), pictures=2 * FRAMES)
        url = {"type": "video_url", "video_url": {"url": file["path"]}}
        yield Form("video_url item", chat(url, question), pictures=FRAMES)


def _videos(folder: Path, frames: list[str]) -> dict[str, Any]:
    pixels = [np.asarray(Image.open(folder / frame)) for frame in frames]
    data = [(folder / frame).read_bytes() for frame in frames]
    found: dict[str, Any] = {
        "frames": frames,
        "frames as bytes": data,
        "frames as structs": [{"bytes": one, "path": frame} for one, frame in zip(data, frames, strict=True)],
        "frames as base64": [base64.b64encode(one).decode() for one in data],
        "frames as arrays": pixels,
        "array": np.stack(pixels),
    }
    if (folder / "clip.avi").exists():
        data = (folder / "clip.avi").read_bytes()
        encoded = base64.b64encode(data).decode()
        found |= {"file": str(folder / "clip.avi"), "bytes": data, "struct": {"bytes": data, "path": "x.avi"}}
        found |= {
            "data URL": f"data:video/x-msvideo;base64,{encoded}",
            "base64": encoded,
            "file URL": f"file://{folder}/clip.avi",
        }
    return found


def _columns(folder: Path) -> Iterator[Form]:
    asked = {"messages": [turn("user", WORDS[0])]}
    bare = {"type": "image"}
    for (name, source), column in itertools.product(_sources(folder).items(), ("image", "images")):
        value = [source] if column == "images" else source
        yield Form(f"{column} column, {name}, beside a string", {**asked, column: value}, pictures=1)
        yield Form(f"{column} column, {name}, beside a prompt", {"prompt": WORDS[0], column: value}, pictures=1)
        yield Form(f"{column} column, {name}, for an item", {**chat(bare, text(WORDS[0])), column: value}, pictures=1)
    tagged = f"<image>{WORDS[0]}<image>"
    two = {"images": ["p0.png", "p1.png"]}
    for name, content in {
        "string with words": tagged,
        "items with words": [text(f"<image> {WORDS[0]}"), text("<image>")],
        "item and word": [bare, text(tagged.removeprefix("<image>"))],
        "items": [bare, text(WORDS[0]), bare],
        "items with an index": [
            {**bare, "text": None, "index": 1},
            {"type": "text", "text": WORDS[0], "index": None},
            {**bare, "index": 0},
        ],
        "no place": WORDS[0],
        "items that hold the same": [{"type": "image", "path": "p0.png"}, {"type": "image", "image": "p1.png"}, text(WORDS[0])],
    }.items():
        for messages in ([turn("user", content)], json.dumps([turn("user", content)])):
            yield Form(f"images for {name}", {"messages": messages, **two}, pictures=2)
    yield Form("image as a list", {**asked, "image": two["images"]}, pictures=2)
    yield Form("images as JSON text", {**asked, "images": json.dumps(two["images"])}, pictures=2)
    yield Form("image and images", {**asked, "image": "p0.png", "images": ["p1.png"]}, pictures=2)
    for name, video in _videos(folder, [f"p{number}.png" for number in range(FRAMES)]).items():
        yield Form(f"video column, {name}", {"prompt": WORDS[0], "video": video}, pictures=FRAMES)
        if not name.startswith(("frames", "array", "bytes")):
            continue  # decoding takes its time
        yield Form(f"videos column, {name}", {**asked, "videos": [video]}, pictures=FRAMES)
        yield Form(
            f"video column, {name}, for a word",
            {"messages": [turn("user", f"<video>{WORDS[0]}")], "video": video},
            pictures=FRAMES,
        )
    for value in (3, 0.5, "a cat", "", None, [1, 2], {"height": 20}, True, ["a", "b"]):
        yield Form(f"a column of the user's own, {value!r}", {**asked, "label": value})


def _layouts() -> Iterator[Form]:
    asked, answer, system = WORDS
    picture = {"image": "p0.png"}
    pairs = [{"user": asked, "assistant": answer, "source": "a"}, {"user": system, "assistant": "7"}]
    human, gpt = {"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}
    both = (asked, answer)
    yield Form("texts", {"images": ["p0.png"], "texts": pairs}, words=WORDS, pictures=1, answered=True)
    yield Form("texts as JSON", {"images": ["p0.png"], "texts": json.dumps(pairs)}, words=WORDS, pictures=1, answered=True)
    yield Form("texts without an answer", {"images": ["p0.png"], "texts": [{"user": asked, "assistant": None}]}, pictures=1)
    for name in ("messages", "conversations", "conversation"):
        yield Form(f"{name}, from and value", {name: [human, gpt], **picture}, words=both, pictures=1, answered=True)
        yield Form(f"{name}, from and value, a question", {name: [human], **picture}, pictures=1)
        yield Form(f"{name}, as JSON", {name: json.dumps([human]), **picture}, pictures=1)
        chat_format = [turn("system", system), turn("user", asked)]
        yield Form(f"{name}, role and content", {name: chat_format, **picture}, words=(system, asked), pictures=1)
    yield Form("system", {"system": system, "conversations": [human], **picture}, words=(system, asked), pictures=1)
    moving = {"conversations": [{"from": "human", "value": f"<image>\n{asked}"}], "video": ["p0.png", "p1.png"]}
    yield Form("from and value, <image> for a video", moving, pictures=2)
    for ask, reply in itertools.product(("prompt", "question"), ("answer", "completion")):
        yield Form(
            f"{ask} and {reply}",
            {ask: asked, reply: answer, **picture},
            words=both,
            pictures=1,
            doors=("training",),
            answered=True,
        )
        lists = {ask: [turn("user", asked)], reply: [turn("assistant", answer)], **picture}
        yield Form(f"{ask} and {reply} as messages", lists, words=both, pictures=1, doors=("training",), answered=True)
        yield Form(
            f"{ask}, with the job's own {reply}", {ask: asked, reply: answer, **picture}, pictures=1, doors=("batch", "ray")
        )
    structs = {"role": ["system", "user"], "content": [system, asked]}
    yield Form("messages as a struct of lists", {"messages": structs}, words=(system, asked))
    repeated = {"prompt": asked, "messages": [turn("user", asked)]}
    yield Form("a prompt that messages repeat", repeated)
    yield Form("an instruction that messages repeat", {**repeated, "instruction": asked})
    body = {"model": "m", "messages": [turn("user", asked)], "max_tokens": 3, "user": "u", "n": 1, "logprobs": False}
    yield Form("body", {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": body})
    parts = [{"type": "input_text", "text": asked}, {"type": "input_image", "image_url": "p0.png", "detail": "auto"}]
    responses = {
        "input": [{"type": "message", "role": "user", "content": parts}],
        "instructions": system,
        "max_output_tokens": 3,
    }
    yield Form("body of a response", {"custom_id": "c", "body": responses}, words=(asked, system), pictures=1)
    yield Form("body of a response, a string", {"body": {"input": asked}})
    yield Form(
        "weight",
        {"messages": [turn("user", asked), turn("assistant", answer, weight=0), turn("user", system, weight=1)]},
        words=WORDS,
    )


def undocumented(folder: Path) -> Iterator[Form]:
    """Generated forms that nothing promises to read: each is used all the same, or named."""
    yield from _odd_items()
    yield from _odd_columns(folder)
    yield from _counts()


def misspelt(name: str) -> list[str]:
    """A name with two letters swapped, one missing, one doubled, another case."""
    middle = len(name) // 2
    swapped = name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
    found = [swapped, name[:middle] + name[middle + 1 :], name[:middle] + name[middle] + name[middle:], name.capitalize()]
    return [one for one in dict.fromkeys(found) if one != name]


def _odd_items() -> Iterator[Form]:
    ask = text(WORDS[0])
    words = WORDS[:2]
    for kind in (
        "audio",
        "input_audio",
        "file",
        "input_file",
        "refusal",
        "tool_use",
        "thinking",
        "document",
        "json",
        "Image",
        "",
        7,
        None,
    ):
        item = {"type": kind, "text": WORDS[1]}
        yield Form(f"item of the type {kind!r}", chat(item, ask), words=words, named=(repr(kind),))
    for kind in ("text", "image", "video", "image_url", "input_text"):
        for other in misspelt(kind):
            yield Form(f"item of the type {other}", chat({"type": other, kind: WORDS[1]}, ask), words=words, named=(other,))
    for kind, key in (("image", "image"), ("image", "path"), ("image", "url"), ("image_url", "image_url"), ("video", "video"),
                      ("text", "text"), ("input_text", "text")):  # fmt: skip
        value = WORDS[1] if key == "text" else "p0.png"
        for other in misspelt(key):
            yield Form(
                f"{kind} item with {other}",
                chat({"type": kind, other: value}, ask),
                pictures=key != "text",
                named=(other, "'text'"),
            )
    for key in ("image", "images", "content", "value", "source", "caption", "label"):
        item = {"type": "text", "text": WORDS[0], key: WORDS[1]}
        yield Form(f"text item with {key}", chat(item), words=words, named=(key,))
        item = {"type": "image", "path": "p0.png", key: "p1.png"}
        yield Form(f"image item with {key}", chat(item, ask), pictures=2, named=(key,))
    yield Form(
        "image item with a text",
        chat({"type": "image", "path": "p0.png", "text": WORDS[1]}, ask),
        words=words,
        pictures=1,
        named=("text",),
    )
    yield Form(
        "image item with an unknown struct",
        chat({"type": "image", "image": {"path": "p0.png", "caption": WORDS[1]}}, ask),
        words=words,
        pictures=1,
        named=("caption",),
    )
    for key in ("name", "tool_calls", "tool_call_id", "images", "image", "thinking", "reasoning_content", "value", "from",
                "train", "contents", "audio", "weigth"):  # fmt: skip
        message = turn("user", WORDS[0], **{key: WORDS[1]})
        yield Form(f"message with {key}", {"messages": [message]}, words=words, named=(key,))
    for key, other in (("role", "rôle"), ("role", "Role"), ("content", "contnet"), ("content", "text")):
        message = {"role": "user", "content": WORDS[0]}
        message[other] = message.pop(key)
        yield Form(f"message with {other}", {"messages": [message]}, named=(key, other))
    for weight in (0.5, "0", -1, [0]):
        yield Form(f"weight {weight}", {"messages": [turn("user", WORDS[0], weight=weight)]}, named=("weight",))
    yield Form("unknown from", {"conversations": [{"from": "observation", "value": WORDS[0]}]}, named=("observation",))
    yield Form("texts with more", {"texts": [{"user": WORDS[0], "context": WORDS[1]}]}, words=words, named=("context",))


def _odd_columns(folder: Path) -> Iterator[Form]:
    asked = {"messages": [turn("user", WORDS[0])]}
    values = _sources(folder)
    for name in ("picture", "img", "photo", "image2", "images_2", "thumbnail", "mask", "frames", "x"):
        for kind in ("path", "file URL", "data URL", "base64", "bytes", "struct of bytes", "struct of a path", "array"):
            yield Form(f"column {name}, {kind}", {**asked, name: values[kind]}, pictures=1, named=(name,))
        yield Form(f"column {name}, a list", {**asked, name: ["p0.png", "p1.png"]}, pictures=2, named=(name,))
        yield Form(f"column {name}, in a struct", {**asked, name: {"left": {"path": "p0.png"}}}, pictures=1, named=(name,))
        yield Form(f"column {name} beside image", {**asked, "image": "p0.png", name: "p1.png"}, pictures=2, named=(name,))
    for known, value, words, pictures in (
        ("image", "p0.png", WORDS[:1], 1),
        ("images", ["p0.png"], WORDS[:1], 1),
        ("video", "p0.png", WORDS[:1], 1),
        ("prompt", WORDS[1], WORDS[:2], 0),
        ("question", WORDS[1], WORDS[:2], 0),
        ("messages", [turn("user", WORDS[1])], WORDS[:2], 0),
        ("conversations", [turn("user", WORDS[1])], WORDS[:2], 0),
    ):
        for other in misspelt(known):
            yield Form(f"column {other}", {**asked, other: value}, words=words, pictures=pictures, named=(other,))
    for known in ("max_new_tokens", "temperature", "do_sample", "repetition_penalty"):
        for other in misspelt(known):
            yield Form(f"column {other}", {**asked, other: 1}, named=(other,), doors=("batch", "ray"))
    for name in ("history", "dialogue", "chosen", "rejected", "turns", "input"):
        for value in ([turn("user", WORDS[1])], json.dumps([turn("user", WORDS[1])]), [{"from": "human", "value": WORDS[1]}]):
            yield Form(f"column {name}", {**asked, name: value}, words=WORDS[:2], named=(name,))
    for name in ("tools", "functions", "audio", "instruction", "query", "content"):
        for value in (WORDS[1], [WORDS[1]]):
            yield Form(f"column {name}", {**asked, name: value}, words=WORDS[:2], named=(name,))
    for item in ({"image": "p0.png"}, {"text": WORDS[1]}, {"source": {"type": "base64", "data": WORDS[1]}}):
        yield Form(f"item without a type, {item}", chat(item, text(WORDS[0])), words=WORDS[:2], named=tuple(item))
    two = {"prompt": WORDS[0], "question": WORDS[1], "messages": [turn("user", WORDS[2])], "texts": [{"user": "7"}]}
    for one, other in itertools.combinations(two, 2):
        yield Form(f"{one} and {other}", {one: two[one], other: two[other]}, words=WORDS, named=(one, other))
    body = {"messages": [turn("user", WORDS[0])]}
    for key, value in (("tools", [{"type": "function"}]), ("n", 2), ("logit_bias", {"5": 1}), ("functions", [1]),
                       ("input", WORDS[1]), ("frequency_penalty", 0.5), ("instructions", WORDS[1]), ("temprature", 0.5),
                       ("stop_token_ids", [3])):  # fmt: skip
        yield Form(f"body with {key}", {"body": {**body, key: value}}, words=WORDS[:2], named=(key,))
    for key, value in (("prompt", WORDS[1]), ("images", ["p0.png"]), ("messages", asked["messages"]), ("system", WORDS[1])):
        yield Form(f"{key} beside a body", {"body": body, key: value}, words=WORDS[:2], pictures=key == "images", named=(key,))


def _counts() -> Iterator[Form]:
    """Every number of pictures in a column with every number of places of each kind."""
    for given, bare, tags, own in itertools.product(range(4), range(3), range(3), range(2)):
        content = [{"type": "image"}] * bare + [text(WORDS[0] + "<image>" * tags)] + [{"type": "image", "path": "p3.png"}] * own
        record = {**chat(*content), "images": [f"p{number}.png" for number in range(given)]}
        yield Form(
            f"{given} images, {bare} items, {tags} words, {own} items with one",
            record,
            pictures=given + own,
            named=(f"{given} image(s)",),
        )
        if not bare and not own:
            record = {"messages": [turn("user", WORDS[0] + "<image>" * tags)], "images": record["images"]}
            yield Form(f"{given} images, a string with {tags} words", record, pictures=given, named=(f"{given} image(s)",))
            record = {
                "conversations": [{"from": "human", "value": WORDS[0] + "<image>" * tags}],
                "images": record["images"] or None,
            }
            yield Form(
                f"{given} images, from and value with {tags} words", record, pictures=given, named=(f"{given} image(s)",)
            )
