"""5,000 damaged files: each gives a result or an error of ours, in under 5 seconds and a gigabyte.

They are read in child processes, so that one that hangs or crashes is named instead of taking the tests along.
"""

import queue
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from .conftest import need, tri_video
from .video_files import write_video

CASES = [(kind, "none", 760) for kind in ("png", "jpeg", "webp", "gif", "tiff")]
CASES += [(kind, backend, 310) for kind in ("mp4", "avi") for backend in ("decord", "pyav")]
assert sum(count for *_, count in CASES) >= 5000
SECONDS = 5
MEGABYTES = 1024


@pytest.mark.parametrize(
    ("kind", "backend", "count"),
    [case if case[0] == "png" else pytest.param(*case, marks=pytest.mark.thorough) for case in CASES],
    ids=[f"{kind}-{backend}" for kind, backend, _ in CASES],
)
def test_damaged(kind, backend, count, tmp_path, data):
    if backend != "none":
        need(backend)
    if kind == "avi":
        shutil.copy(data / "clip.avi", tmp_path)
    elif kind == "mp4":
        for codec in ("mpeg4", "libx264"):
            write_video(tmp_path / f"{codec}.mp4", tri_video(20, 48, 64), codec=codec)
    script = Path(__file__).parent / "damaged_files.py"
    command = [sys.executable, str(script), kind, backend if backend != "none" else "pyav", "0", str(count), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        lines, errors = queue.Queue(), []
        readers = [
            threading.Thread(target=lambda: [lines.put(line) for line in child.stdout] + [lines.put("")], daemon=True),
            threading.Thread(target=lambda: errors.extend(child.stderr), daemon=True),
        ]
        for reader in readers:
            reader.start()
        last, started = "nothing", False
        while True:
            try:
                line = lines.get(timeout=SECONDS if started else 60)
            except queue.Empty:
                child.kill()
                pytest.fail(f"{kind} {backend}: {last!r} takes longer than {SECONDS} s")
            if not line or line.startswith("end"):
                break
            last, started = line.strip(), True
        child.wait(timeout=60)
        for reader in readers:
            reader.join(timeout=10)
    assert child.returncode == 0 and line.startswith("end"), f"{kind} {backend}: {last!r}\n{''.join(errors[-30:])}"
    read, refused, peak, _slowest = line.split()[1:]
    assert int(read) + int(refused) == count
    assert int(read) > 0 and int(refused) > 0  # the damage is neither none nor total
    assert int(peak) < MEGABYTES
    print(f"{kind} {backend}: {line.strip()}")
