"""The command: what it prints for this machine, for chips that are not here, and for mistakes."""

import argparse
import importlib.util
import itertools
import json
import os
import re
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from smolvlm_jax import resolve
from smolvlm_jax.cli import main
from smolvlm_jax.encoder_kernels import shape
from smolvlm_jax.errors import InputError, MissingExtraError, MissingFileError
from smolvlm_jax.plan import CHIPS, Cost, PlanConfig, Workload, plan, report, target
from smolvlm_jax.plan.cli import add_parser
from smolvlm_jax.plan.figures import Memory, Plan
from smolvlm_jax.plan.inference import EngineOnChips
from smolvlm_jax.plan.measure import Measurer
from smolvlm_jax.plan.models import describe, given_mesh
from smolvlm_jax.plan.report import chart, check_chart, to_text
from smolvlm_jax.plan.settings import KINDS
from smolvlm_jax.plan.target import parse_target
from smolvlm_jax.plan.training import recipe_of
from smolvlm_jax.plan.workload import rate_of, record_seconds
from smolvlm_jax.sharding import make_mesh

compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler: pip install 'smolvlm-jax[plan]' on x86-64 Linux"
)
SMALL = Workload(tiles=1, prompt=40, new=20)


def test_what_is_named_and_is_not_there():
    words = r"\(data × fsdp × tensor; -1 in one of them takes what is left\)"
    with pytest.raises(
        InputError, match=rf"--mesh data=3: a mesh of 3 × 1 × 1 does not use 8 devices exactly {words}; --on here has 8"
    ):
        given_mesh(PlanConfig(mesh="data=3"), jax.devices())
    with pytest.raises(MissingFileError, match=r"no model '3b'.*; not a size \(256m, 500m, 2\.2b\)"):
        describe("3b", dtype="float32")
    recipe = recipe_of(PlanConfig(recipe="lora-256m", attention="einsum"))
    assert recipe.attention == "einsum" and recipe.dtype == "bfloat16"


def test_the_page_names_every_option():
    commands = argparse.ArgumentParser().add_subparsers()
    add_parser(commands)
    page = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    flags = {flag for flag in commands.choices["plan"]._option_string_actions if flag.startswith("--")}
    assert flags - {"--help"} <= set(re.findall(r"--[a-z-]+", page))


@pytest.mark.parametrize("kind", shape._CHIPS)
def test_a_chip_at_hand_is_found_by_what_jax_calls_it(kind, monkeypatch):
    """The same chip as the encoder's kernels are sized for."""
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    found = target.chip_here()
    assert found is not None and found.name.removeprefix("tpu") == shape._CHIPS[kind]


def test_kinds_are_those_of_the_programs_that_are_compiled():
    """Also where every program of the engine is compiled; kinds that leave none are refused."""
    mesh, model = make_mesh(devices=jax.devices()[:1]), describe("tiny", dtype="float32")
    for every in (False, True):
        for kinds in (("decode",), ("encode", "insert"), KINDS):
            config = PlanConfig(model="tiny", workload=SMALL, slots=(8,), kinds=kinds, all_programs=every)
            engine = EngineOnChips(model, mesh, Measurer(None), config, lambda *_: None)
            found = [key[0] for key in engine.keys(engine.shapes(config.slots))]
            assert set(found) == set(kinds) and (len(found) > len(kinds)) == every
    for wrong in (dict(kinds=()), dict(kinds=("encode",), workload=Workload(tiles=0))):
        with pytest.raises(InputError, match="nothing is left to compile"):
            PlanConfig(**wrong)


def test_names_of_chips():
    assert parse_target("v5e-8") == parse_target("v5litepod-8") == parse_target("v5e:2x4")
    assert parse_target("v6e-16").shape == (4, 4) and parse_target("v5p-32").shape == (2, 2, 4)  # of v5p cores are counted
    for name, said in (("v5litepod-12", "v5e-16"), ("h100-8", "write h100:8"), ("tpu7x-8", "write tpu7x:2x2x1")):
        with pytest.raises(InputError, match=said):
            parse_target(name)
    assert parse_target("V5E:2x4") == parse_target("v5e:2x4")
    assert parse_target("v5e:2x4").shape == (2, 4) and parse_target("v5e:2x4").count == 8
    assert parse_target("v5e").count == parse_target("v5e:1x1").count == parse_target("h100").count == 1
    assert parse_target("v5e:2").count == 2 and parse_target("v5p:2x2").shape == (2, 2) and parse_target("v6e:1x2").count == 2
    assert parse_target("h100:3").count == 3
    assert parse_target("h100:8").shape == (8,) and parse_target("here").shape == ()


@compiler
@pytest.mark.parametrize("on", ["v5e:4x4", "v6e:4x4", "v6e:2x4", "v5p:2x2x4", "v5p:4x4", "tpu7x:2x2x2"])
def test_any_mesh_can_be_made_of_a_slice(on):
    """Also where one of its axes is no axis of the chips' network, for which jax wants to be asked."""
    devices = parse_target(on).devices()
    sizes = [2**n for n in range(len(devices).bit_length())]
    for data, fsdp, tensor in itertools.product(sizes, repeat=3):
        if data * fsdp * tensor == len(devices):
            mesh = given_mesh(PlanConfig(on=on, mesh=f"data={data},fsdp={fsdp},tensor={tensor}"), devices)
            assert mesh.devices.shape == (data, fsdp, tensor) and set(mesh.devices.flat) == set(devices)


@compiler
def test_a_mesh_of_some_chips_of_a_host():
    """As mesh.devices=3 makes it."""
    some = parse_target("v5e:2x2").devices()[:3]
    assert make_mesh(devices=some).devices.ravel().tolist() == list(some)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on", "v7e"], "no chip 'v7e'; known are v5e, v5p, v6e"),
        (["--on", "v5e:2*4"], "'2*4' is no number of chips; write v5e:2x2, say"),
        (["--on", "h100:2x4"], "write h100:8, say"),
        (["--on", "v5e:3"], "--on v5e:3: 3 is no slice of v5e; write v5e:2x2, say"),
        (["--on", "v5p:1x3"], "write v5p:2x2x1, say"),
        (["--on", "v5e:8"], "--on v5e:8: 8 is no slice of v5e; write v5e:2x4, say"),
        (["--on", "v6e:2x2x2"], "write v6e:2x4, say"),
        (["--on", "here:2"], "--on here:2: here is all devices of this machine, without a number"),
        (["--on", "v5e", "--mode", "train"], "--mode train needs --recipe"),
        (["--on", "v5e", "steps=3"], "'steps=3' changes a recipe, and there is none"),
        (["--on", "v5e", "--tiles", "-1"], "--tiles must be at least 0, got -1"),
        (["--on", "v5e", "--max-slots", "--slots", "4"], "--max-slots searches the slots"),
        (["--recipe", "nothing"], "no recipe 'nothing'"),
        (["--recipe", "lora-256m", "--on", "v5e", "--slots", "4"], "--slots: of the engine, while --recipe lora-256m is about"),
        (["--recipe", "lora-256m", "--on", "v5e", "--tiles", "2"], "--tiles, --prompt and --new: of the engine"),
        (["--on", ""], "no chip ''; known are v5e"),
        (["--on", "v5e", "--json", "absent/p.json"], "cannot write absent/p.json: No such file or directory"),
        (["--model", "tiny", "--on", "here", "--live", "0.5"], "--live 0.5: a decode step on this machine reads all columns"),
        (["--on", "v5e", "--chart", "."], "cannot write .: Is a directory"),
        (["--on", "v5e", "--json", "gs://bucket/p.json"], "--json gs://bucket/p.json: plan writes to a disk, not to a URL"),
        (["--on", "v5e", "--json", "p.svg", "--chart", "p.svg"], "--json and --chart both write p.svg: name two files"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    """Said at once: before a compiler works for minutes, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words]) == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.strip().splitlines()) == 1 and not out
    assert not list(tmp_path.iterdir())


def cost(name: str, *, milliseconds: float, estimated: float) -> Cost:
    return Cost(name=name, floor_seconds=milliseconds / 1e3, estimated_seconds=estimated / 1e3, xla_cycles=1e6)


COSTS = [
    cost("encode 16 tiles", milliseconds=16, estimated=32),
    cost("prefill 1 × 2048", milliseconds=4, estimated=8),
    cost("insert 2048 into 2048", milliseconds=1, estimated=1),
    cost("decode 64 × 2048", milliseconds=2, estimated=4),
]


def test_a_record_takes_its_share_of_every_program():
    shape = dict(lanes=1, slots=64, tiles=16, row=2048)
    found = record_seconds(COSTS, [0.016, 0.004, 0.001, 0.002], Workload(tiles=8, prompt=1000, new=641), **shape)
    assert found == pytest.approx({"encode": 0.008, "prefill": 0.002, "insert": 0.001, "decode": 0.020})
    rate = rate_of(COSTS, CHIPS["v5e"], Workload(tiles=8, prompt=1000, new=641), **shape)
    assert rate is not None and rate.high == pytest.approx(1 / 0.031) and rate.low == pytest.approx(1 / 0.061)
    assert sum(rate.shares.values()) == pytest.approx(1) and "8 tiles" in rate.assumptions[0]
    unknown = rate_of(
        [replace(c, estimated_seconds=None) for c in COSTS], CHIPS["tpu7x"], Workload(tiles=8, prompt=1000, new=641), **shape
    )
    assert unknown is not None and unknown.low is None and unknown.high == rate.high, "cycles, and a clock that nobody knows"


def test_a_plan_as_text_json_and_chart(tmp_path):
    memory = Memory(kinds={"weights": 10**9, "KV cache": 2 * 10**9}, largest="encode 16 tiles", usable=4 * 10**9)
    rate = rate_of(COSTS, CHIPS["v5e"], SMALL, lanes=1, slots=64, tiles=16, row=2048)
    found = Plan(
        model="m", chip="v5e", chips=1, mesh={"data": 1}, mode="infer", shapes={"slots": (64,)}, memory=memory,
        programs=tuple(COSTS), rate=rate,
    )  # fmt: skip
    text = to_text(found)
    assert re.search(r"^all +3\.000 +75\.0%$", text, re.M) and re.search(r"^left +1\.000 +25\.0%$", text, re.M)
    assert "records/s on 1 chip" in text and all(c.name in text for c in COSTS)
    assert json.loads(json.dumps(found.to_dict()))["memory"]["total"] == 3 * 10**9
    chart(found, tmp_path / "a.svg")
    assert "KV cache: 2.000 GB" in (tmp_path / "a.svg").read_text()
    with pytest.raises(InputError, match="cannot write"):
        chart(found, tmp_path / "absent" / "a.svg")


def test_files_of_other_kinds_are_written_as_they_are(tmp_path, monkeypatch, capsys):
    """The reader of a pipe gets the text and then its end; a link stays one, with what it names yet to be made."""
    memory = Memory(kinds={"weights": 10**9}, largest="m", usable=None)
    found = Plan(model="m", chip="c", chips=1, mesh={"data": 1}, mode="infer", shapes={}, memory=memory, programs=())
    monkeypatch.setattr("smolvlm_jax.plan.run.plan", lambda *_: found)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "target.json")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    for name in ("pipe", "link"):
        assert main(["plan", "--json", str(tmp_path / name), "--quiet"]) == 0
    reader.join(10)
    assert (tmp_path / "link").is_symlink() and [(tmp_path / "target.json").read_text()] == read
    assert json.loads(read[0]) == json.loads(json.dumps(found.to_dict()))


def test_formats_of_charts(monkeypatch):
    canvas = SimpleNamespace(get_supported_filetypes=lambda: {"png": "", "pdf": ""})
    monkeypatch.setattr(report, "_new_figure", lambda: SimpleNamespace(canvas=canvas))
    check_chart(Path("a.PNG"))
    with pytest.raises(InputError, match=r"cannot draw a\.bmpx: charts are \.svg, or \.pdf, \.png"):
        check_chart(Path("a.bmpx"))


@pytest.mark.thorough
def test_this_machine(tmp_path, capsys):
    """The bundled checkpoint's engine on the CPU: compiled in a child, printed, written."""
    words = ["--tiles", "1", "--prompt", "40", "--new", "20", "--slots", "8", "--json", str(tmp_path / "p.json")]
    assert main(["plan", "--model", "tiny", "--on", "here", "--dtype", "float32", *words]) == 0
    out, err = capsys.readouterr()
    assert "smolvlm-jax: compiling 4 of 4: decode 8 × 256" in err and "KV cache" in out
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["shapes"]["slots"] == [8] and found["rate"] is None
    kinds = found["memory"]["kinds"]
    assert 0 <= (resolve("tiny") / "model.safetensors").stat().st_size - kinds["weights"] < 1e5, "float32, and a header"
    decode = found["programs"][-1]
    assert decode["flops"] > 0 and decode["alias_bytes"] >= kinds["KV cache"] * 0.99


@compiler
@pytest.mark.thorough
def test_a_chip_that_is_not_here():
    """Two layers of each part of the 256M on one v5e chip: what is stated and what the compiler counts agree."""
    found = plan(
        PlanConfig(model="256m", on="v5e", layers=(2, 2), ring_lengths=(256,), slots=(32,), kinds=("decode",), workload=SMALL)
    )
    (decode,) = found.programs
    kinds = found.memory.kinds
    assert found.memory.total == sum(kinds.values()) < found.memory.usable == CHIPS["v5e"].usable
    assert found.shapes["encoder_tiles"] == 16 and found.shapes["chunk"] == 16, "a TPU's, on whatever machine it is compiled"
    # Two layers × keys and values × 32 rows × 3 heads × 256 columns × 64 × 2 bytes, and what the rows hold besides.
    assert kinds["KV cache"] >= 2 * 2 * 32 * 3 * 256 * 64 * 2
    assert decode.alias_bytes == kinds["KV cache"], "the ring is updated in place, and takes what the program says"
    assert decode.cycles > 0 and not decode.missing_kernels and not decode.collectives


@compiler
@pytest.mark.thorough
def test_what_does_not_fit_is_one_line(capsys):
    words = ["--model", "2.2b", "--on", "v5e", "--ring-lengths", "8192", "--slots", "64"]
    assert main(["plan", *words, "--quiet"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(r"does not fit: .* GB too much; lower --slots", line)


@pytest.mark.parametrize(
    ("on", "words", "extra"),
    [
        ("v5e", "Unable to load libtpu.so", "plan"),
        ("v5e", "JAX TPU support not installed; cannot generate TPU topology", "plan"),
        ("h100", "Unknown backend cuda", "plan-cuda"),
    ],
)
def test_without_the_compiler_the_extra_is_named(on, words, extra, monkeypatch):
    def absent(*args, **kwargs):
        raise RuntimeError(words)

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", absent)
    monkeypatch.setattr("smolvlm_jax.plan.target.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'smolvlm-jax\[{extra}\]'"):
        parse_target(on).devices()
