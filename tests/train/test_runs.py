"""Whole runs in processes of their own: killed, told to stop, moved to fewer devices, on two hosts; and what they leave."""

import json
import os
import random
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from train_helpers import ROOT, complaints, losses, recipe, small_checkpoint, start, write_records


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small checkpoint, some records and a compilation cache that all runs of this file share."""
    folder = tmp_path_factory.mktemp("runs")
    write_records(folder, 30)
    write_records(folder, 6, seed=5, name="held_out")
    small_checkpoint(folder)
    return folder


def cached(home: Path) -> dict[str, str]:
    return {
        "JAX_COMPILATION_CACHE_DIR": str(home / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def finish(process, code: int = 0) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert not complaints(err), f"nothing to complain about, nothing left: {err}"
    return out


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def wait_for_step(run: Path, step: int, process) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached: {process.poll()}")


STEPS = 24


@pytest.fixture(scope="module")
def undisturbed(home):
    """A run of 24 steps that nothing disturbs, with an evaluation in the middle and at the end."""
    evaluation = {"path": str(home / "held_out.jsonl"), "every": 12, "samples": 6, "batch_size": 6, "max_new_tokens": 4}
    path = recipe(home, home / "model", steps=STEPS, output=str(home / "whole"), evaluation=evaluation, keep=3)
    out = finish(start(path, **cached(home)))
    assert f"step {STEPS}, loss" in out and "Hugging Face format" in out
    return home / "whole"


@pytest.mark.thorough
def test_what_a_run_leaves(undisturbed):
    names = {p.name for p in undisturbed.iterdir()}
    assert names == {
        "checkpoints", "config.json", "curves.png", "evaluation.json", "metrics.jsonl", "model", "run.json", "samples.html"
    }  # fmt: skip
    steps = sorted(int(p.name) for p in (undisturbed / "checkpoints").iterdir() if p.name.isdecimal())
    assert steps[-3:] == [20, 22, 24] and len(steps) <= 4, "the newest three, and the best"
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    assert {"token_accuracy", "gradient_norm", "learning_rate", "padding", "tile_padding", "skipped", "tokens_s"} <= set(
        trained[0]
    )
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "one line for each step"
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    explained = {name for row in re.findall(r"^\| (`.*?) \|", page, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert {key for line in lines for key in line} <= explained, "every key is explained in docs/train.md"
    assert [line["step"] for line in lines if "exact_match" in line] == [12, 24]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert len(held_out) == 2 and 0 < held_out[1] < held_out[0]
    page = (undisturbed / "samples.html").read_text()
    assert page.count("<tr>") == 6 and page.count("data:image/png;base64,") == 6 and "of 6 answers are exact" in page
    assert json.loads((undisturbed / "evaluation.json").read_text())["step"] == STEPS
    from PIL import Image

    with Image.open(undisturbed / "curves.png") as picture:
        assert picture.size == (720, 4 * 240)
    from smolvlm_jax import load

    model, _ = load(undisturbed / "model")
    assert model.config.text_config.num_hidden_layers == 1
    load(undisturbed)  # the run itself too: its newest checkpoint


@pytest.mark.thorough
def test_killed_at_five_random_steps(home, undisturbed, tmp_path):
    """kill -9, five times, resumed each time: the losses seen and the final weights are those of the undisturbed run."""
    chosen = sorted(random.Random(time.time_ns()).sample(range(3, STEPS - 1), 5))
    path = recipe(
        tmp_path, home / "model", steps=STEPS, output=str(tmp_path / "run"), data={"train": str(home / "train.jsonl")}
    )
    for step in chosen:
        process = start(path, **cached(home))
        wait_for_step(tmp_path / "run", step, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(path, **cached(home)))
    assert losses(tmp_path / "run") == losses(undisturbed), f"killed at {chosen}"
    assert weights(tmp_path / "run") == weights(undisturbed), f"killed at {chosen}"


@pytest.mark.thorough
def test_sigterm_and_ctrl_c_save_first_and_leave_nothing_behind(home, undisturbed, tmp_path):
    """With worker processes. Exit codes 143 and 130, no complaint, no shared memory, a checkpoint of the last step done, what
    to do next, and in the end one line of metrics for each step."""
    data = {"train": str(home / "train.jsonl"), "workers": 2}
    path = recipe(tmp_path, home / "model", steps=STEPS, output=str(tmp_path / "run"), checkpoint_every=1000, data=data)
    shared = Path("/dev/shm")
    before = set(os.listdir(shared)) if shared.is_dir() else set()
    process = start(path, **cached(home))
    wait_for_step(tmp_path / "run", 3, process)
    process.terminate()
    time.sleep(0.001)
    process.terminate()  # the same stop, as `timeout` sends it
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (143, "") and not complaints(err), err
    stopped = re.search(rf"stopped at step (\d+) of {STEPS}, which is saved in {tmp_path}.*: run the same command again", err)
    assert stopped and "stopping: the step under way" in err
    if shared.is_dir():
        left = {name for name in set(os.listdir(shared)) - before if (shared / name).exists()}
        assert not {name for name in left if name.startswith(("psm_", "sem."))}, left
    done = max(losses(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [str(done)] == [stopped[1]] and done < STEPS
    process = start(path, "data.workers=0", **cached(home))
    wait_for_step(tmp_path / "run", done + 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, "") and f"resuming from step {done} of {STEPS}" in err and "run the same" in err
    finish(start(path, "data.workers=0", **cached(home)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert weights(tmp_path / "run") == weights(undisturbed)


@pytest.mark.thorough
def test_eight_devices_then_four(home, tmp_path):
    """The state is spread over eight devices, taken up on four, and goes on as it would have on eight."""
    runs = {}
    for name, devices in (("whole", (8, 8)), ("moved", (8, 4))):
        changes = dict(output=str(tmp_path / name), steps=6, mesh={"fsdp": -1, "devices": None}, export=False)
        changes["data"] = {"train": str(home / "train.jsonl"), "batch_size": 8}
        if name == "whole":  # generation on the mesh, too
            changes["evaluation"] = {"path": str(home / "held_out.jsonl"), "samples": 2, "max_new_tokens": 2}
        path = recipe(tmp_path, home / "model", **changes)
        for count, stop in zip(devices, (3, 6), strict=True):
            # The schedule is that of six steps: what stops the first half is a checkpoint, not an end.
            process = start(path, "checkpoint_every=3", devices=count, **cached(home))
            if stop == 3:
                wait_for_step(tmp_path / name, 3, process)
                process.terminate()
            _, err = process.communicate(timeout=300)
            assert process.returncode in ((0, 143) if stop == 3 else (0,)), err
        runs[name] = losses(tmp_path / name)
    assert '"exact_match"' in (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert list(runs["moved"]) == [1, 2, 3, 4, 5, 6]
    assert list(runs["moved"].values()) == pytest.approx(list(runs["whole"].values()), rel=1e-4)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_pair(recipe: Path, *words: str):
    """Two processes of one job, of four fake devices each."""
    port = free_port()
    return [
        start(
            recipe,
            *words,
            devices=4,
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
            JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo",
        )
        for index in range(2)
    ]


@pytest.mark.thorough
def test_two_processes_equal_one(home, tmp_path):
    """Two processes of four fake devices each, as two hosts, have the loss curve of one process of eight; both resume."""
    common = dict(
        steps=6,
        mesh={"data": 2, "fsdp": 4, "devices": None},
        data={"train": str(home / "train.jsonl"), "batch_size": 8, "packing": False},
        checkpoint_every=3,
        evaluation={"path": str(home / "held_out.jsonl"), "samples": 5, "batch_size": 3, "max_new_tokens": 3},
    )
    one = recipe(tmp_path, home / "model", output=str(tmp_path / "one"), **common)
    process = start(one, devices=8, **cached(home))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    two = recipe(tmp_path, home / "model", output=str(tmp_path / "two"), distributed=True, **common)
    for words in (["evaluation=null"], []):  # the second time from the checkpoint of step 3
        processes = start_pair(two, *words)
        results = [p.communicate(timeout=300) for p in processes]
        assert [p.returncode for p in processes] == [0, 0], results
        curve = losses(tmp_path / "two")
        assert list(curve) == [1, 2, 3, 4, 5, 6]
        assert list(curve.values()) == pytest.approx(list(losses(tmp_path / "one").values()), rel=1e-4)
        import shutil

        shutil.rmtree(tmp_path / "two" / "checkpoints" / "6")
    assert (tmp_path / "one" / "evaluation.json").read_text() == (tmp_path / "two" / "evaluation.json").read_text()
    assert '"exact_match"' in (tmp_path / "two" / "metrics.jsonl").read_text()
    from smolvlm_jax import load
    from smolvlm_jax.parameters import flatten_params

    ours, theirs = (flatten_params(load(tmp_path / name / "model")[1]) for name in ("two", "one"))
    assert all(abs(ours[p] - theirs[p]).max() <= 2e-3 for p in ours)


@pytest.mark.thorough
def test_sigterm_to_one_process_of_two(home, tmp_path):
    """Both stop at the same step, with a checkpoint, and exit code 143; started again they go on from there."""
    path = recipe(
        tmp_path,
        home / "model",
        steps=400,
        mesh={"data": 2, "fsdp": 4, "devices": None},
        data={"train": str(home / "train.jsonl"), "batch_size": 8, "packing": False},
        checkpoint_every=1000,
        distributed=True,
        export=False,
    )
    processes = start_pair(path)
    wait_for_step(tmp_path / "run", 2, processes[0])
    processes[1].terminate()
    results = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [143, 143], results
    done = max(losses(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [str(done)] and 2 <= done < 400
    processes = start_pair(path, f"steps={done + 1}")
    results = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], results
    assert list(losses(tmp_path / "run")) == list(range(1, done + 2))


@pytest.mark.thorough
def test_tensorboard(home, tmp_path):
    pytest.importorskip("tensorboardX", reason="the TensorBoard logger needs tensorboardX (tensorboard extra)")
    path = recipe(tmp_path, home / "model", steps=2, data={"train": str(home / "train.jsonl")}, export=False)
    finish(start(path, "loggers=[tensorboard]", **cached(home)))
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"token_accuracy" in events.read_bytes() and not (tmp_path / "run" / "model").exists()


def test_mistakes_are_one_line(home, tmp_path):
    cases = {
        ("data.lenght=3",): r"unknown key data\.lenght; did you mean length",
        ("steps=-1",): "steps must be a number from 1 to 2,147,483,647, not -1",
        ("data.train=/nowhere.jsonl",): "no records at /nowhere.jsonl",
        ("model=nowhere",): "no model 'nowhere'",
        ("mesh.devices=9",): "mesh.devices is 9, but there are 1",
        ("lora.targets=nothing",): "matches no projection; names are ",
    }
    path = recipe(tmp_path, home / "model", data={"train": str(home / "train.jsonl")})
    for words, message in cases.items():
        process = start(path, *words, **cached(home))
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and re.search(message, err) and err.count("\n") == 1, err
