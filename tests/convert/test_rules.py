"""The table: closed for every published size, and its regions are those of the whole."""

import math
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm_jax.config import SmolVLMConfig, SmolVLMTextConfig, SmolVLMVisionConfig
from smolvlm_jax.convert.blocks import aligned, copy_into, count_nonfinite
from smolvlm_jax.convert.family_names import FAMILIES
from smolvlm_jax.convert.opened import parameter_shapes
from smolvlm_jax.convert.rules import (
    RULES,
    factor_patterns,
    match_parameters,
    rearrange,
    restore,
    torch_name,
    torch_region,
    torch_shape,
)
from smolvlm_jax.convert.safetensors_file import DTYPES
from smolvlm_jax.convert.to_hf import parse_size
from smolvlm_jax.errors import CheckpointError, InputError
from smolvlm_jax.model import SmolVLMForConditionalGeneration
from smolvlm_jax.parameters import summed_dimensions

_KERNELS = {pattern for path, pattern in RULES.items() if path.endswith("kernel")}
PATTERNS = sorted({*RULES.values(), "() v d -> v d", *(factor for kernel in _KERNELS for factor in factor_patterns(kernel))})
VISION = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16
)
LARGE = dict(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14
)


def text(hidden, layers, heads, kv, mlp, vocab=49280):
    sizes = dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv)
    return SmolVLMTextConfig(intermediate_size=mlp, head_dim=64, vocab_size=vocab, **sizes)


# size -> (text, vision, scale, tied, tensors in its file, parameters)
SIZES = {
    "256M": (text(576, 30, 9, 3, 1536), VISION, 4, False, 471, 256_484_928),
    "500M": (text(960, 32, 15, 5, 2560), VISION, 4, False, 489, None),
    "2.2B": (text(2048, 24, 32, 32, 8192), LARGE, 3, False, 657, None),
    "2.2B v1": (text(2048, 24, 32, 32, 8192, 49155), LARGE, 3, False, 657, None),
    "granite-docling": (text(576, 30, 9, 3, 1536, 100352), VISION, 4, True, 470, None),
}

ONE_LAYER = SmolVLMConfig(
    SmolVLMVisionConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4),
    SmolVLMTextConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9),
    scale_factor=2,
)


@pytest.mark.parametrize("size", SIZES)
def test_the_table_is_closed_for_every_published_size(size):
    text_config, vision, scale, tied, tensors, count = SIZES[size]
    config = SmolVLMConfig(SmolVLMVisionConfig(**vision), text_config, scale_factor=scale, tie_word_embeddings=tied)
    parameters = parameter_shapes(config)
    files = {torch_name(path)[0]: torch_shape(torch_name(path)[1], shape) for path, shape in parameters.items()}
    assert len(files) == len(parameters) == tensors
    assert count is None or sum(math.prod(shape) for shape in files.values()) == count
    assert files["model.text_model.layers.0.self_attn.q_proj.weight"] == (
        text_config.num_attention_heads * 64,
        text_config.hidden_size,
    )
    assert len(match_parameters(parameters, files, "here")) == tensors
    bare = {name.removeprefix("model."): shape for name, shape in files.items() if name != "lm_head.weight"}
    headless = {path: shape for path, shape in parameters.items() if path != "lm_head/kernel"}
    assert len(match_parameters(headless, bare, "here")) == len(bare)


def test_every_row_is_used_and_no_two_rows_meet():
    paths = {*parameter_shapes(ONE_LAYER), *parameter_shapes(ONE_LAYER.replace(embedding_dim=4))}  # with a head, for retrieval
    names = {torch_name(path)[0] for path in paths}
    assert len(names) == len(paths) == len(RULES)
    with pytest.raises(CheckpointError, match="no rule"):
        torch_name("model/text_model/layers_0/lora/kernel")


def test_every_row_of_another_family_is_used_and_no_two_rows_meet():
    for names in FAMILIES.values():
        paths = parameter_shapes(ONE_LAYER)
        matches = [names.match(path) for path in paths]
        assert len({(match.torch, match.part) for match in matches}) == len(paths)
        assert not names.rows or len(names.rows) == len(paths)
        parts = Counter(match.torch for match in matches)
        assert all(parts[match.torch] == match.parts for match in matches), "a tensor is used whole"


def test_patterns_of_kernels_are_those_of_their_projections():
    """A projection's kernel has the summed dimensions first, and is a matrix (out, in) in PyTorch."""
    kernels = summed_dimensions(SmolVLMForConditionalGeneration(ONE_LAYER))
    assert len(kernels) == 2 + 7 + 6
    for path, summed in kernels.items():
        names = torch_name(path)[1].split("->")[1].split()
        groups = [part if len(part) == 1 else [f"({' '.join(part)})"] for part in (names[summed:], names[:summed])]
        assert torch_name(path)[1] == f"{groups[0][0]} {groups[1][0]} -> {' '.join(names)}", path


@st.composite
def parameters(draw):
    pattern = draw(st.sampled_from(PATTERNS))
    shape = tuple(draw(st.integers(1, 6)) for _ in pattern.split("->")[1].split())
    region = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        region.append(slice(start, draw(st.integers(start + 1, size))))
    return pattern, shape, tuple(region)


@given(parameters())
@settings(deadline=None, max_examples=300)
def test_a_region_is_that_region_of_the_whole(case):
    pattern, shape, region = case
    size = torch_shape(pattern, shape)
    tensor = np.arange(math.prod(size)).reshape(size)
    whole = rearrange(tensor, pattern, shape)
    assert whole.shape == shape
    assert np.array_equal(restore(whole, pattern), tensor)
    slices, part, cut = torch_region(pattern, shape, region)
    assert np.array_equal(rearrange(tensor[slices], pattern, part)[cut], whole[region])


def test_a_region_of_whole_heads_reads_nothing_else():
    slices, _, _ = torch_region("(n h) d -> d n h", (48, 6, 8), (slice(12, 24), slice(2, 4), slice(0, 8)))
    assert slices == (slice(16, 32), slice(12, 24))


@given(
    shape=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(sorted(dtype.name for dtype in DTYPES.values())),
    target=st.sampled_from(sorted(dtype.name for dtype in DTYPES.values())),
)
@settings(deadline=None, max_examples=60)
def test_copies_in_blocks_are_copies(shape, seed, kind, target):
    known = {dtype.name: dtype for dtype in DTYPES.values()}
    rng = np.random.default_rng(seed)
    source = rng.standard_normal(shape).astype(known[kind]).transpose(rng.permutation(len(shape)))
    order = rng.permutation(len(shape))
    out = np.empty([source.shape[axis] for axis in order], known[target]).transpose(np.argsort(order))
    copy_into(out, source)
    assert np.array_equal(out, source.astype(known[target]))


@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (300, 40, 3)])
def test_aligned_arrays_are_used_by_jax_as_they_are(shape):
    array = aligned(shape, np.float32)
    array[...] = 3
    taken = jax.device_put(array)
    assert array.shape == taken.shape and array.flags.c_contiguous
    if array.size > 1:
        assert array.ctypes.data % 64 == 0 and taken.unsafe_buffer_pointer() == array.ctypes.data
    assert (np.asarray(taken) == 3).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_nonfinite_values_are_counted_exactly(dtype):
    values = np.random.default_rng(0).standard_normal(200_001).astype(dtype)
    assert count_nonfinite(values) == 0
    values[[0, 70_000, 200_000]] = [np.nan, np.inf, -np.inf]
    assert count_nonfinite(values.reshape(3, -1)) == 3
    assert count_nonfinite(np.array([np.finfo(np.float32).max], np.float32)) == 0


@pytest.mark.parametrize(("said", "meant"), [("4GB", 4 * 10**9), ("1.5 MiB", 3 << 19), ("10kb", 10_000), (17, 17), ("8", 8)])
def test_sizes(said, meant):
    assert parse_size(said) == meant


@pytest.mark.parametrize("said", ["", "GB", "-1GB", "0", "4 PB", "1e9", "9" * 400, "9" * 400 + "GB"], ids=lambda said: said[:9])
def test_sizes_that_are_none(said):
    with pytest.raises(InputError, match="not a size"):
        parse_size(said)


@pytest.mark.parametrize("name", ["SmolVLM-256M-Instruct", "SmolVLM2-500M-Video-Instruct", "granite-docling-258M"])
def test_published_files_are_matched(published, name):
    """The config and the list of tensors of published checkpoints, byte for byte."""
    lines = (published / name / "TENSORS.tsv").read_text().splitlines()
    files = {row[0]: tuple(int(n) for n in row[2].split("x")) for row in (line.split("\t") for line in lines)}
    config = SmolVLMConfig.from_pretrained(published / name)
    assert config.tie_word_embeddings == ("lm_head.weight" not in files)
    matches = match_parameters(parameter_shapes(config), files, name)
    assert {match.torch for match in matches} == set(files)
