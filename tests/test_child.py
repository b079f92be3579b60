"""Child processes: what they are sent, how long they may take, and when they end."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from smolvlm_jax import child

pytestmark = pytest.mark.skipif(not child.AVAILABLE, reason="no child processes with a socket on this system")

SERVE = """
import os, sys, time
from smolvlm_jax.child import parent

def serve():
    channel = parent()
    setup = channel.receive()
    if setup == "leave":
        sys.exit(3)
    channel.send((setup, os.getpid()))
    for kind, value in channel.messages():
        if kind == "echo":
            channel.send(value)
        elif kind == "print":
            os.write(1, value)
            channel.send(sys.stdin.read())
        elif kind == "code":
            class Code:
                def __reduce__(self):
                    return os.mkdir, (value,)
            channel.send(Code())
        elif kind == "sleep":
            time.sleep(value)
        elif kind == "abort":
            os.kill(os.getpid(), 9)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts children of the module above; those that are left are ended."""
    (tmp_path / "served.py").write_text(SERVE)
    monkeypatch.syspath_prepend(tmp_path)
    children = []

    def start(setup="hello") -> child.Child:
        children.append(child.Child("served", quiet=True))
        return children[-1].begin(setup)

    yield start
    for one in children:
        one.end()


def gone(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_messages_are_what_was_sent(start):
    one = start({"a": 1})
    assert one.started[0] == {"a": 1} and one.alive()
    picture = np.random.default_rng(0).integers(0, 256, (40, 512, 512, 3), np.uint8)
    for message in (None, "text", b"x" * 10**6, [picture, picture[::2], np.zeros((0, 3))], {"nested": (1, picture[0])}):
        thread = threading.Thread(target=one.send, args=(("echo", message), 20))
        thread.start()
        answer = one.receive(20)
        thread.join()
        if isinstance(message, list):
            assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(answer, message, strict=True))
            assert answer[0].flags.writeable
        elif isinstance(message, dict):
            assert np.array_equal(answer["nested"][1], picture[0])
        else:
            assert answer == message


def test_a_child_can_send_no_code(start, tmp_path):
    """A file that takes over a decoder in the child gets no further."""
    one = start()
    one.send(("code", str(tmp_path / "made")))
    with pytest.raises(ConnectionError, match=r"posix\.mkdir"):
        one.receive(10)
    assert not (tmp_path / "made").exists()


def test_what_a_child_prints_and_reads_is_no_message(start):
    one = start()
    one.send(("print", b"noise" * 100))
    assert one.receive(10) == ""


def test_deadlines(start):
    one = start()
    one.send(("sleep", 1000))
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        one.receive(0.3)
    with pytest.raises(TimeoutError):  # nobody reads, so the socket is full some time
        one.send(("echo", b"x" * 10**8), 0.3)
    assert time.monotonic() - begin < 5
    one.end()
    assert not one.alive() and gone(one.started[1])


def test_a_child_that_ends_is_noticed_at_once(start):
    with pytest.raises(EOFError):
        start("leave")
    one = start()
    one.send(("abort", None))
    with pytest.raises(EOFError):
        one.receive(60)
    assert one.exit_code() == -9
    two = start()
    threading.Timer(0.2, two.kill).start()
    with pytest.raises(EOFError):
        two.receive(60)


def test_a_child_outlives_the_thread_that_started_it(start):
    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(start).result()
    time.sleep(0.3)
    one.send(("echo", 7))
    assert one.receive(10) == 7


def test_children_serve_threads_that_outlive_the_main_one(start, tmp_path):
    code = f"""
import sys, threading, time
sys.path.insert(0, {str(tmp_path)!r})
from smolvlm_jax.child import Child
one = Child("served", quiet=True).begin(None)

def work():
    threading.main_thread().join()
    time.sleep(0.5)
    for each in (one, Child("served", quiet=True).begin(None)):
        each.send(("echo", 1))
        print(each.receive(20))

threading.Thread(target=work).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert done.stdout == "1\n1\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("closed", ["", "import os; os.close(0)", "import os; os.close(0); os.close(1); os.close(2)"])
def test_children_end_with_a_parent_that_is_killed(start, tmp_path, closed):
    """Also one that hangs, and also where the parent's own standard streams are closed."""
    code = f"""
import sys
{closed}
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from smolvlm_jax.child import Child
children = [Child("served", quiet=True).begin(None) for _ in range(2)]
children[0].send(("sleep", 1000))
children[1].send(("echo", 1))
assert children[1].receive(20) == 1
Path({str(tmp_path / "started")!r}).write_text(" ".join(str(one.started[1]) for one in children))
children[1].receive(1000)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert all(gone(int(pid)) for pid in (tmp_path / "started").read_text().split())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_starts_children_of_its_own(start):
    one = start()
    pid = os.fork()
    if pid == 0:
        try:
            own = child.Child("served", quiet=True).begin("fork")
            own.send(("echo", 5))
            os._exit(0 if own.receive(20) == 5 else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    one.send(("echo", 6))
    assert one.receive(10) == 6
