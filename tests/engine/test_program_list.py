"""docs/batch.md lists the programs of an engine: as many of each kind as its code asks for."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from smolvlm_jax import SmolVLMForConditionalGeneration
from smolvlm_jax.engine.compiled import Programs
from smolvlm_jax.engine.settings import EngineConfig
from smolvlm_jax.parameters import abstract_params
from smolvlm_jax.sharding import make_mesh, replicated
from smolvlm_jax.sizes import published_config

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "batch.md").read_text(encoding="utf-8")
# What `resolve` chooses on a TPU, spelled out on this machine.
TPU = dict(prefill_tokens=2048, encoder_tiles=16, chunk=16)


def counts(**settings) -> Counter:
    model = SmolVLMForConditionalGeneration(published_config("SmolVLM-256M-Instruct"))
    placed = replicated(make_mesh(devices=jax.devices()[:1]))
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), abstract_params(model, model.dtype)
    )
    shapes = EngineConfig(**settings).resolve(model, None)
    keys = Programs(model, params, replace(shapes, few=()) if settings.get("chunk") == TPU["chunk"] else shapes, None).keys()
    return Counter(key[0] for key in keys)


@pytest.mark.parametrize(("settings", "column"), [({}, 0), (TPU, 1)], ids=["CPU", "TPU"])
def test_the_page_lists_the_programs_of_an_engine(settings, column):
    rows = dict(re.findall(r"^\| `?(\w+)`? \| (\d+ \| \d+) \|", PAGE, re.M))
    listed = {name: int(numbers.split(" | ")[column]) for name, numbers in rows.items()}
    found = counts(**settings)
    assert listed.pop("all") == found.total() and Counter(listed) == found
    one = re.search(r"leaves (\d+) on a CPU and (\d+) on a TPU", PAGE)
    assert one is not None and int(one.group(column + 1)) == counts(**settings, ring_lengths=(2048,)).total()
