"""What the engine makes of its settings: sizes, slots, programs kept on the disk, refusals."""

import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from smolvlm_jax import SmolVLMProcessor, load, resolve
from smolvlm_jax.compilation_cache import keep_compiled_programs
from smolvlm_jax.engine import Engine, EngineConfig, Request, SamplingParams
from smolvlm_jax.engine.compiled import Programs
from smolvlm_jax.engine.packing import Pack
from smolvlm_jax.engine.settings import EngineShapes
from smolvlm_jax.errors import InputError


@pytest.fixture(scope="module")
def tiny():
    model, params = load("tiny")
    return model, params, SmolVLMProcessor.from_pretrained(resolve("tiny"))


def test_few_lengths_of_packed_rows(tiny):
    """The prompt of a split picture fits closely; an insertion serves several lengths."""
    model, params, _ = tiny
    sizes = dict(encoder_tiles=1, chunk=1, run_ahead=0, feature_places=64)
    shapes = EngineShapes(ring_lengths=(2048,), slots=(2,), prefill_tokens=2048, **sizes)
    programs = Programs(model, params, shapes, None)
    assert programs.buckets == [64, 128, 256, 512, 1024, 1280, 1536, 1792, 2048]
    assert [programs.columns[t] for t in programs.buckets[4:]] == [1024, *[2048] * 4]
    pack = Pack(1, programs.segments, shapes.prefill_tokens)
    assert [pack.length_with(0, tokens, None) for tokens in (1024, 1100, 1500, 1793, 2049)] == [1024, 1280, 1536, 2048, None]
    inserted = [key for key in programs.keys() if key[0] == "insert"]  # noqa: SIM118 (a method of ours)
    assert inserted == [("insert", t, 2048) for t in (64, 128, 256, 512, 1024, 2048)]
    longer, whole = programs.returns("prefill", 1280), programs.returns("prefill", 2048)
    assert jax.tree.map(lambda x: x.shape, longer) == jax.tree.map(lambda x: x.shape, whole)


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 2)])
def test_slots_of_a_gpu_are_multiples_of_eight_where_there_are_so_many(tiny, data, fsdp):
    lanes, most = data * fsdp, {}
    for platform in ("gpu", "tpu"):
        found = []
        for limit in range(10**7, 4 * 10**8, 10**7):
            device = SimpleNamespace(platform=platform, memory_stats=lambda limit=limit: {"bytes_limit": limit})
            devices = np.full((lanes,), device)
            mesh = SimpleNamespace(shape={"data": data, "fsdp": fsdp, "tensor": 1}, devices=devices)
            found.append(EngineConfig(ring_lengths=(256, 512)).resolve(tiny[0], mesh).slots)
        most[platform] = found
    for gpu, tpu in zip(most["gpu"], most["tpu"], strict=True):
        for mine, fits in zip(gpu, tpu, strict=True):
            assert mine == (fits if fits < 8 * lanes else fits - fits % (8 * lanes))
    assert {n % (8 * lanes) for slots in most["tpu"] for n in slots} > {0}


@pytest.mark.parametrize(("platform", "data", "slots", "said"), [
    ("gpu", 1, 98, "slots 98: .* for 96 or 104 slots"),
    ("gpu", 4, 36, "slots 36: .* for 32 or 64 slots"),
    ("gpu", 1, 96, None),
    ("gpu", 4, 12, None),  # three a shard: there is no smaller multiple
    ("tpu", 1, 98, None),
])  # fmt: skip
def test_other_slots_of_a_gpu_are_taken_with_a_warning(tiny, platform, data, slots, said):
    device = SimpleNamespace(platform=platform, memory_stats=lambda: {"bytes_limit": 10**9})
    mesh = SimpleNamespace(shape={"data": data, "fsdp": 1, "tensor": 1}, devices=np.full((data,), device))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert EngineConfig(ring_lengths=(256,), slots=(slots,)).resolve(tiny[0], mesh).slots == (slots,)
    assert [bool(re.search(said or "", str(each.message))) for each in found] == [True] * (said is not None)


def test_settings_that_contradict_the_model_are_refused(tiny):
    for wrong in [
        EngineConfig(ring_lengths=(10**6,)),
        EngineConfig(slots=(1,)),
        EngineConfig(ring_lengths=(64,), slots=(0,)),
        EngineConfig(encoder_tiles=3),
        EngineConfig(chunk=-1),
        EngineConfig(run_ahead=-1),
        EngineConfig(ring_lengths=()),
        *(EngineConfig(**{name: value}) for name in ("cache_bytes", "encoder_tiles", "feature_places") for value in (0, -4)),
    ]:
        with pytest.raises(InputError):
            Engine(*tiny, wrong)
    for wrong in [
        {"max_new_tokens": 0},
        {"temperature": 0.0},
        {"stop": "word"},
        {"top_p": 1.5},
        {"seed": 2**32},
        {"do_sample": 1},
        {"stop": {"a": 1}},
        {"stop": ["x"] * 10**4},
        {"stop": 7},
        *({"temperature": value} for value in (1e-60, 1e300, 10**400, float("inf"), float("nan"), True, "1")),
        *({"repetition_penalty": value} for value in (1e-300, 1e300, float("nan"), -1)),
        *({"top_k": value} for value in (-2, 2**31, 1.5, True)),
        *({"top_p": value} for value in (0, True, float("nan"))),
        *({"min_p": value} for value in (-0.1, 1.1, float("nan"), "0")),
        *({"max_new_tokens": value} for value in (-1, 1.5, True, None)),
    ]:
        with pytest.raises(InputError):
            SamplingParams(**wrong)
    assert SamplingParams(top_k=-1).top_k == 0
    with pytest.raises(InputError):
        Request(1)


@pytest.mark.thorough
def test_compiled_programs_are_kept_on_disk(tmp_path):
    """A second process finds what the first has compiled; a user's own choice stands."""
    code = (
        "import jax; from smolvlm_jax.engine import Engine;"
        "Engine.from_pretrained('tiny', ring_lengths=(64,), slots=(1,)).programs.get('prefill', 64);"
        "print(jax.config.jax_compilation_cache_dir)"
    )
    run = lambda **extra: subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **extra}, capture_output=True, text=True, check=True
    ).stdout.strip()
    home = {"XDG_CACHE_HOME": str(tmp_path / "home")}
    assert run(**home) == str(tmp_path / "home" / "smolvlm_jax" / "programs")
    kept = sorted((tmp_path / "home" / "smolvlm_jax" / "programs").glob("*-cache"))
    assert kept
    run(**home)
    assert sorted((tmp_path / "home" / "smolvlm_jax" / "programs").glob("*-cache")) == kept
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")) == str(tmp_path / "own")


def test_a_user_without_a_home_keeps_no_programs(monkeypatch):
    """As in a container whose user is unknown to it."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
