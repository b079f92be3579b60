"""Mutations of the small files of a checkpoint: each a directory that somebody may have by accident, or by intent.

`python tests/side_files.py COUNT SEED` runs so many and prints what leaves the library that is none of its errors, names no
file, takes more than 5 seconds, or more than 2 GB.
"""

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open

SECONDS, BYTES = 5.0, 2 * 10**9
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
FILES = (
    *MODEL_FILES,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
VALUES: tuple[Any, ...] = (
    *(None, -1, 0, 1, 2, 1.5, True, False, "x", "", [], [1], {}, {"a": 1}, ["x", {}], [None], [[]]),
    *(10**12, 10**400, 2**31, 2**63, -(10**6), float("nan"), float("inf"), 1e308, 1e-300, "x" * 100_000, "\ud800", "é\x00"),
    *("llama", "<image>", [1, 2, 3], [0.5, 0.5, 0.5], {"longest_edge": 10**9}, {"longest_edge": "x"}, "{% for"),
)
RAW = {
    "empty": lambda data: b"",
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "UTF-8 that is none": lambda data: data.replace(b'"', b'"\xff\xfe', 1),
    "nested lists": lambda data: b"[" * 200_000,
    "nested objects": lambda data: b'{"a":' * 900 + b"1" + b"}" * 900,
    "a list": lambda data: b"[1, 2]",
    "null": lambda data: b"null",
    "a number": lambda data: b"1e999",
    "a long number": lambda data: b'{"a": ' + b"9" * 10_000 + b"}",
    "a key twice": lambda data: data.rstrip()[:-1] + b', "model_type": "x", "model_type": "y"}',
    "many empty lists": lambda data: b'{"a": [' + b"[]," * 2_500_000 + b"[]]}",
    "spaces": lambda data: data + b" " * 110_000_000,
    "bytes of zero": lambda data: b"\0" * 1000,
}


@dataclass(frozen=True)
class Mutation:
    """One file, changed. `path` leads to the changed value where it is one; `text` is None for what is no file at all."""

    name: str
    what: str
    data: bytes | None
    path: tuple[Any, ...] = ()


def base(directory: Path) -> dict[str, bytes]:
    """The files that are mutated, some of which the bundled checkpoint does not have."""
    found = {name: (directory / name).read_bytes() for name in FILES if (directory / name).exists()}
    config = json.loads(found["config.json"])
    config["text_config"] |= {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "sliding_window": None}
    generation = json.loads(found["generation_config.json"])
    generation |= {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
    generation |= {"max_new_tokens": 20, "num_beams": 1}
    tokens = json.loads(found["tokenizer_config.json"])
    added = {"0": {"content": "<|endoftext|>", "special": True, "lstrip": False}}
    tokens |= {"added_tokens_decoder": added, "extra_special_tokens": {"image_token": "<image>"}, "padding_side": "right"}
    tokens |= {"chat_template": "x", "additional_special_tokens": ["<image>"], "model_max_length": 1000}
    video = json.loads(found["preprocessor_config.json"]) | {"num_frames": 4, "fps": 1}
    video |= {"video_sampling": {"max_frames": 4, "fps": 1, "video_size": {"longest_edge": 48}}}
    more = {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer_config.json": tokens,
        "added_tokens.json": {"<loc_1>": 448, "<loc_2>": 449},
        "video_preprocessor_config.json": video,
    }
    with safe_open(directory / "model.safetensors", "numpy") as weights:
        names = list(weights.keys())
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    more["model.safetensors.index.json"] = index
    jinja = json.loads(found["chat_template.json"])["chat_template"]
    return found | {name: json.dumps(value).encode() for name, value in more.items()} | {"chat_template.jinja": jinja.encode()}


def mutations(files: dict[str, bytes], count: int, seed: int) -> Iterator[Mutation]:
    """So many mutations, the same for the same seed."""
    rng = random.Random(seed)
    fixed = [Mutation(name, what, change(data)) for name, data in files.items() for what, change in RAW.items()]
    fixed += [Mutation(name, what, None) for name in files for what in ("a directory", "a pipe", "a broken link")]
    rng.shuffle(fixed)
    for number in range(count):
        if fixed and number % 4 == 0:
            yield fixed.pop()
            continue
        name = rng.choice([name for name in files if name != "chat_template.jinja"])
        value = json.loads(files[name])
        kind = rng.randrange(8)
        if kind == 0:
            yield Mutation(name, "cut", files[name][: rng.randrange(len(files[name]))])
            continue
        if kind == 1:
            data = bytearray(files[name])
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            yield Mutation(name, "bytes", bytes(data))
            continue
        path = rng.choice(list(paths(value, depth=4)))
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        if kind == 2 and isinstance(holder, dict):
            del holder[path[-1]]
            yield Mutation(name, "removed", json.dumps(value).encode(), path)
        else:
            new = rng.choice(VALUES)
            holder[path[-1]] = new
            yield Mutation(name, f"{new!r:.30}", json.dumps(value).encode("utf-8", "surrogatepass"), path)


def paths(value: Any, here: tuple = (), depth: int = 4) -> Iterator[tuple]:
    """Where values are in a JSON value; of a long object or list a few places only."""
    entries = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    for key, item in entries if len(entries) < 80 else entries[:: len(entries) // 20]:
        yield (*here, key)
        if depth:
            yield from paths(item, (*here, key), depth - 1)


def write(mutation: Mutation, target: Path) -> None:
    """Put the changed file in place of the whole one."""
    path = target / mutation.name
    path.unlink(missing_ok=True)
    if mutation.data is not None:
        path.write_bytes(mutation.data)
    elif mutation.what == "a directory":
        path.mkdir()
    elif mutation.what == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")


def fault(mutation: Mutation, target: Path) -> str | None:
    """What is wrong with the way the library takes the directory, or None."""
    from smolvlm_jax import GenerationConfig, SmolVLMProcessor
    from smolvlm_jax.convert.opened import open_checkpoint
    from smolvlm_jax.errors import SmolVLMError

    picture = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "a <loc_1>"}]}]
    start, memory, opened = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, False
    try:
        if mutation.name in MODEL_FILES:
            with open_checkpoint(target):
                GenerationConfig.from_pretrained(target)
        else:
            processor = SmolVLMProcessor.from_pretrained(target)
            opened = True
            processor.encode_chat(chat, special_tokens_in_text="escape")
        problem = None
    except SmolVLMError as error:
        named = mutation.name in str(error) or opened  # what fails later fails on the conversation
        key = next((key for key in reversed(mutation.path) if isinstance(key, str)), "")
        known = mutation.name in ("tokenizer.json", "model.safetensors.index.json") or opened
        named = named and (known or key in str(error) or any(str(part) in str(error) for part in mutation.path))
        fits = "do not fit the config" in str(error)  # weights and config.json disagree, and the tensors are listed
        problem = None if fits or (named and "\n" not in str(error)) else f"names no file or key, or has lines: {error!s:.200}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__}: {str(error)[:150]} at {Path(place.filename).name}:{place.lineno}"
    if time.process_time() - start > SECONDS:
        problem = f"{problem or ''} {time.process_time() - start:.1f} seconds"
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
    if grown > BYTES:
        problem = f"{problem or ''} {grown / 1e9:.1f} GB"
    return problem and f"{mutation.name} {'.'.join(map(str, mutation.path))} {mutation.what}: {problem}"


def run(count: int, seed: int, source: Path) -> tuple[int, list[str]]:
    """How many mutations were tried, and what was wrong."""
    files = base(source)
    found: list[str] = []
    tried = 0
    with tempfile.TemporaryDirectory() as folder:
        for mutation in mutations(files, count, seed):
            target = Path(folder) / "m"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
            for name in (mutation.name, "tokenizer_config.json"):
                (target / name).write_bytes(files[name])
            if mutation.name == "chat_template.jinja":
                (target / "chat_template.json").unlink()
            if mutation.name in ("special_tokens_map.json", "added_tokens.json"):  # read only without this
                (target / "tokenizer_config.json").write_text("{}")
            write(mutation, target)
            tried += 1
            problem = fault(mutation, target)
            found += [problem] if problem else []
    return tried, found


if __name__ == "__main__":
    from smolvlm_jax import resolve

    count, seed = (int(text) for text in sys.argv[1:3])
    start = time.monotonic()
    tried, found = run(count, seed, Path(resolve("tiny")))
    for line, times in Counter(found).most_common():
        print(times, line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{tried} mutations, {len(found)} faults, {time.monotonic() - start:.0f} s, peak {peak:.2f} GB")
