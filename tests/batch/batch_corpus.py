"""Records for batch jobs in tests: of every kind, some of them damaged, one of which ends its decoder."""

import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from smolvlm_jax.records.record import Record, record_from
from smolvlm_jax.storage import AnyPath

# Of the jobs that are killed.
FLAGS = ("--shard-size", "100", "--workers", "2", "--seed", "7", "--quiet")

ABORTING = b"ABORT! says the decoder of this picture"

# Python imports this module in every process that finds it on PYTHONPATH: a decoder that takes its process along.
_PLUGIN = """
    import os, resource
    from PIL import Image, ImageFile

    class Aborting(ImageFile.ImageFile):
        format = "ICO"

        def _open(self):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.abort()

    class Hanging(ImageFile.ImageFile):
        format = "JPEG2000"

        def _open(self):
            import time
            time.sleep(1000)

    # In the place of two decoders that no test needs: no others than those known by name are asked.
    Image.init()
    Image.register_open("ICO", Aborting, lambda prefix: prefix.startswith(b"ABORT!"))
    Image.register_open("JPEG2000", Hanging, lambda prefix: prefix.startswith(b"HANG!"))
"""


def environment(plugins: Path | None = None) -> dict[str, str]:
    """Of a job's process: one device, and the decoder above in each of its workers."""
    out = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    out["JAX_PLATFORMS"] = "cpu"
    if plugins is not None:
        plugins.mkdir(exist_ok=True)
        (plugins / "sitecustomize.py").write_text(textwrap.dedent(_PLUGIN))
        out["PYTHONPATH"] = str(plugins)
    return out


def pictures(folder: Path, count: int = 24) -> list[str]:
    """Names of small pictures of many shapes, made by a formula."""
    names = []
    for number in range(count):
        height, width = 12 + 37 * number % 90, 12 + 53 * number % 110
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([x * number % 256, y * 7 % 256, (x + y * number) * 3 % 256], axis=-1).astype(np.uint8)
        names.append(f"picture{number}.{'png' if number % 3 else 'jpg'}")
        Image.fromarray(pixels).save(folder / names[-1])
    return names


def videos(folder: Path, count: int = 4) -> list[str]:
    """Names of mp4 files of one to four seconds."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "processing"))
    from video_files import write_video

    names = []
    for number in range(count):
        frames = [np.full((32, 48, 3), (20 * number + 9 * step) % 256, np.uint8) for step in range(5 * (number + 1))]
        names.append(f"clip{number}.mp4")
        write_video(folder / names[-1], frames, rate=5)
    return names


def chat(text: str, *items: dict) -> list[dict]:
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]


def write_corpus(folder: Path, count: int, seed: int = 0) -> tuple[Path, set]:
    """(a JSONL file of `count` records, the ids of those that must end in an error)."""
    rng = random.Random(seed)
    pics, clips = pictures(folder), videos(folder)
    (folder / "aborting.png").write_bytes(ABORTING)
    (folder / "torn.png").write_bytes((folder / pics[1]).read_bytes()[:60])
    (folder / "torn.mp4").write_bytes((folder / clips[-1]).read_bytes()[:200])
    inline = "data:image/png;base64," + base64.b64encode((folder / pics[2]).read_bytes()).decode()
    damaged = [
        lambda key: (key, {"messages": chat("Number?", {"type": "image", "path": "nowhere.png"})}),
        lambda key: (key, {"messages": chat("Number?", {"type": "image", "path": "torn.png"})}),
        lambda key: (key, {"messages": chat("What happens?", {"type": "video", "path": "torn.mp4"})}),
        lambda key: (key, {"messages": []}),
        lambda key: (key, {"messages": chat("Number?"), "temperature": -1}),
        lambda key: (key, {"messages": chat("Number?", {"type": "image"})}),
        lambda key: (key, '{"id": "torn", "messages": [{"role": "us'),  # its id becomes the line's number
        lambda key: (key, {"messages": chat("word " * 1500)}),
    ]
    wrong, lines = set(), []
    bad = set(rng.sample(range(count), max(len(damaged), count // 100)))
    abort = rng.choice(sorted(set(range(count)) - bad))
    for number in range(count):
        key, value = f"record-{number}", None
        if number in bad:
            key, value = damaged[len(wrong) % len(damaged)](key)
            key = key if isinstance(value, dict) else number + 1
            wrong.add(key)
        elif number == abort:
            value = {"messages": chat("Number?", {"type": "image", "path": "aborting.png"})}
            wrong.add(key)
        else:
            value = _healthy(number, rng, pics, clips, inline)
        if isinstance(value, dict):
            value = json.dumps({"custom_id" if "body" in value else "id": key, **value})
        lines.append(value)
    path = folder / "records.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path, wrong


def _healthy(number: int, rng: random.Random, pics: list[str], clips: list[str], inline: str) -> dict:
    kind, picture = rng.random(), lambda: {"type": "image", "path": rng.choice(pics)}
    limit = rng.choice((1, 2, 5, 20, 60)) if rng.random() < 0.9 else rng.randint(100, 200)
    own = {"max_new_tokens": limit}
    if rng.random() < 0.3:
        own["ignore_eos"] = True
    if rng.random() < 0.2:
        own |= {"do_sample": True, "temperature": 0.8, "top_k": 5}
    if rng.random() < 0.1:
        own["repetition_window"] = 16
    if kind < 0.5:
        words = f"{rng.randrange(10000)} and {rng.randrange(10000)}: which number is larger?"
        return {"messages": [{"role": "user", "content": words}], **own}
    if kind < 0.92:
        many = 1 if kind < 0.75 else rng.randint(2, 4)
        return {"messages": chat("What number is written here?", *(picture() for _ in range(many))), **own}
    if kind < 0.96:
        return {"messages": chat("What happens?", {"type": "video", "path": rng.choice(clips)}), **own}
    body = {"messages": chat("Number?", {"type": "image_url", "image_url": {"url": inline}}), "max_tokens": limit}
    return {"method": "POST", "url": "/v1/chat/completions", "body": body}


class Parse:
    """For workers: a payload that is a record as JSON has it; for a string, the modules that are loaded."""

    def __call__(self, payload) -> Record:
        if isinstance(payload, str):
            return Record("modules", error=" ".join(sys.modules))
        return record_from(payload, "none")

    def identify(self, payload) -> str | int:
        return payload["id"]


parse = Parse()


# ---- running jobs


def start(source: Path | str, out: AnyPath, *flags: str, plugins: Path | None = None, more=(), **options) -> subprocess.Popen:
    """A batch job in a process of its own. more: variables of its environment."""
    model = () if {"--model", "--adapter"} & set(flags) else ("--model", "tiny")
    command = [sys.executable, "-m", "smolvlm_jax", "batch", str(source), str(out), *model, *flags]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, env={**environment(plugins), **dict(more)}, text=True, **options)


def run_to_the_end(
    source: Path | str, out: AnyPath, kills: int, rng: random.Random, *flags: str, plugins: Path, **options
) -> str:
    """Start a job, kill -9 it `kills` times after a random number of rows, then let it finish. Returns its output."""
    import psutil

    for _ in range(kills):
        process = start(source, out, *FLAGS, *flags, plugins=plugins, **options)
        time.sleep(rng.random())
        family = []
        if kill_after(process, out, rng.randint(1, 250), signal.SIGSTOP):
            family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive, "workers outlive their job"
    process = start(source, out, *FLAGS, *flags, plugins=plugins, **options)
    printed, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return printed


def finished_rows(out: AnyPath) -> int:
    """Rows on the disk, in parts and in working files."""
    total = 0
    for path in [*out.glob("part-*"), *out.glob(".part-*.rows")]:
        try:
            total += path.read_bytes().count(b"\n")
        except FileNotFoundError:
            pass
    return total


def kill_after(process: subprocess.Popen, out: AnyPath, rows: int, number: int = signal.SIGKILL, timeout: float = 120) -> bool:
    """Send a signal once so many more rows are there; False if the job ended before."""
    goal, deadline = finished_rows(out) + rows, time.monotonic() + timeout
    while finished_rows(out) < goal and process.poll() is None:
        assert time.monotonic() < deadline, "the job makes no progress"
        time.sleep(0.02 if isinstance(out, Path) else 0.3)
    if process.poll() is not None:
        return False
    process.send_signal(number)
    return True


def summary_of(out: AnyPath) -> dict:
    """What a job of one host has written about itself."""
    return json.loads((out / "_summary-0-of-1.json").read_bytes())


def rows_of(out: AnyPath) -> list[dict]:
    return [json.loads(line) for path in sorted(out.glob("part-*.jsonl")) for line in path.read_bytes().splitlines()]


def multiset(rows: list[dict], folder: AnyPath | str = "") -> Counter:
    """Rows apart from their timing, from the folder of the input that errors name, and from what is said of absent pictures
    beside that: of one with a long path, that it is no base64 text either."""

    def plain(value):
        if not folder or not isinstance(value, str):
            return value
        return re.sub(r"(no \w+ at '.*?')[:;].*", r"\1", value.replace(str(folder), "FOLDER"))

    return Counter(json.dumps({name: plain(value) for name, value in row.items() if name != "seconds"}) for row in rows)
