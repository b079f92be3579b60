"""PEFT adapters merged into their base, and the names that wrappers of a model give to its tensors."""

import json
import math
import re
import shutil
from pathlib import Path

import convert_helpers as helpers
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiers import fast_first

from smolvlm_jax.checkpoint import load, resolve
from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.convert.readers import plain_name
from smolvlm_jax.errors import CheckpointError, InputError

QUERY = "model.text_model.layers.0.self_attn.q_proj"
PATCHES = "model.vision_model.embeddings.patch_embedding"
WORDS = "model.text_model.embed_tokens"
ROWS = "token_adapter.trainable_tokens_delta"
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": False, "fan_in_fan_out": False, "bias": "none"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return helpers.make(tmp_path_factory.mktemp("base") / "hf")


def factors(base: Path, modules=(QUERY, PATCHES, "lm_head"), rank: int = 4) -> dict[str, np.ndarray]:
    """A and B of modules, as PEFT names and shapes them."""
    rng, found = np.random.default_rng(0), {}
    for module in modules:
        shape = helpers.weights(base)[f"{module}.weight"].shape
        found[f"base_model.model.{module}.lora_A.weight"] = rng.normal(size=(rank, *shape[1:])).astype(np.float32)
        tail = (1,) * (len(shape) - 2)
        found[f"base_model.model.{module}.lora_B.weight"] = rng.normal(size=(shape[0], rank, *tail)).astype(np.float32)
    return found


def write(directory: Path, tensors: dict, base: Path | None = None, **settings) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    named = {} if base is None else {"base_model_name_or_path": str(base)}
    (directory / "adapter_config.json").write_text(json.dumps({**SETTINGS, **named, **settings}))
    return directory


def by_hand(base: Path, tensors: dict, scale: float) -> dict[str, np.ndarray]:
    """The merged weights, in double precision and rounded once."""
    merged = helpers.weights(base)
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors[name].astype(np.float64), tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
        weight = merged[f"{module}.weight"]
        product = (b.reshape(len(b), -1) @ a.reshape(len(a), -1)).reshape(weight.shape)
        merged[f"{module}.weight"] = (weight + scale * product).astype(weight.dtype)
    return merged


def close(found: Path, wanted: dict) -> bool:
    tensors = helpers.weights(found)
    assert tensors.keys() == wanted.keys()
    return all(np.allclose(tensors[name].astype(np.float64), wanted[name].astype(np.float64), 2e-6, 1e-6) for name in wanted)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 6 / 4),
        ({"use_rslora": True}, 6 / math.sqrt(4)),
        ({"lora_alpha": 32, "alpha_pattern": {"q_proj": 6, "patch_embedding": 6, "^lm_head": 6}}, 6 / 4),
        ({"lora_alpha": 32, "alpha_pattern": {"self.attn.q_proj": 6, "patch.embedding": 6, "lm_head": 6}}, 6 / 4),
        ({"r": 9, "rank_pattern": {"self_attn.q_proj": 4, "patch_embedding": 4, "lm_head": 4}}, 6 / 4),
    ],
)
def test_an_adapter_is_merged_into_its_base(base, tmp_path, settings, scale):
    tensors = factors(base)
    adapter = write(tmp_path / "adapter", tensors, base, **settings)
    convert(adapter, tmp_path / "merged", to="hf", quiet=True)
    assert close(tmp_path / "merged", by_hand(base, tensors, scale))
    convert(adapter, tmp_path / "orbax", quiet=True)
    for a, b in zip(jax.tree.leaves(load(adapter)[1]), jax.tree.leaves(load(tmp_path / "orbax", check=True)[1]), strict=True):
        assert np.array_equal(a, b)


def test_the_base_may_be_named_and_in_any_format(base, tmp_path):
    tensors = factors(base)
    convert(base, tmp_path / "orbax", quiet=True)
    adapter = write(tmp_path / "adapter", tensors)
    (adapter / "tokenizer_config.json").write_text('{"mine": 1}')
    with pytest.raises(CheckpointError, match="names no base: say which"):
        load(adapter)
    write(adapter, tensors, Path("somebody/else"))
    with pytest.raises(CheckpointError, match=r"its base somebody/else cannot be opened: name the base with --base"):
        load(adapter)
    write(adapter, tensors, adapter)
    with pytest.raises(CheckpointError, match="names itself"):
        load(adapter)
    assert helpers.call("convert", adapter, tmp_path / "merged", "--to", "hf", "--base", tmp_path / "orbax", "--quiet") == 0
    assert close(tmp_path / "merged", by_hand(base, tensors, 1.5))
    assert (tmp_path / "merged" / "tokenizer_config.json").read_text() == '{"mine": 1}'
    with pytest.raises(InputError, match="no PEFT adapter"):
        load(base, base=base)


def test_what_was_trained_whole_takes_the_place_of_the_bases(base, tmp_path):
    """modules_to_save, biases, and an adapter of an embedding, whose factors are those of its transpose."""
    rng = np.random.default_rng(1)
    table = helpers.weights(base)[f"{WORDS}.weight"]
    head = rng.normal(size=table.shape).astype(np.float32)
    bias = rng.normal(size=32).astype(np.float32)
    a, b = rng.normal(size=(4, len(table))), rng.normal(size=(table.shape[1], 4))
    tensors = {
        "base_model.model.lm_head.weight": head,
        "base_model.model.model.vision_model.post_layernorm.bias": bias,
        f"base_model.model.{WORDS}.lora_embedding_A": a.astype(np.float32),
        f"base_model.model.{WORDS}.lora_embedding_B": b.astype(np.float32),
    }
    adapter = write(tmp_path / "adapter", tensors, base, modules_to_save=["lm_head"], bias="all")
    convert(adapter, tmp_path / "merged", to="hf", quiet=True)
    wanted = helpers.weights(base) | {"lm_head.weight": head, "model.vision_model.post_layernorm.bias": bias}
    wanted[f"{WORDS}.weight"] = (table + 1.5 * (b.astype(np.float32) @ a.astype(np.float32)).T).astype(np.float32)
    assert close(tmp_path / "merged", wanted)


def test_an_embeddings_table_is_saved_beside_its_factors(base, tmp_path):
    """PEFT saves the table of an embedding that has an adapter, which training may have changed: both count."""
    rng = np.random.default_rng(2)
    table = helpers.weights(base)[f"{WORDS}.weight"] + 1
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((4, len(table)), (table.shape[1], 4)))
    tensors = {
        f"base_model.model.{WORDS}.lora_embedding_A": a,
        f"base_model.model.{WORDS}.lora_embedding_B": b,
        f"base_model.model.{WORDS}.base_layer.weight": table,
    }
    convert(write(tmp_path / "adapter", tensors, base), tmp_path / "merged", to="hf", quiet=True)
    assert close(tmp_path / "merged", helpers.weights(base) | {f"{WORDS}.weight": table + 1.5 * (b @ a).T})


def test_the_result_has_the_dtype_of_the_base(tmp_path):
    base = helpers.make(tmp_path / "hf", dtype="bfloat16")
    tensors = factors(base)
    convert(write(tmp_path / "adapter", tensors, base), tmp_path / "merged", to="hf", quiet=True)
    found, wanted = helpers.weights(tmp_path / "merged"), by_hand(base, tensors, 1.5)
    assert {array.dtype for array in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert all((found[name] != wanted[name]).mean() < 1e-3 for name in wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "LOHA"},
        {"peft_type": None},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 2]]},
        {"target_parameters": ["x"]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "lora_ga"},
        {"r": 0},
        {"r": "4"},
        {"r": 8},
        {"lora_alpha": None},
        {"lora_alpha": math.nan},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"(a+)+": 2}},
        {"alpha_pattern": {"(a|a)*b": 2}},
        {"rank_pattern": {"a?" * 40 + "a" * 40: 4}},
        {"rank_pattern": {".*.*.*.*b": 4}},
        {"rank_pattern": {f".*{n}.*b": 4 for n in range(99)}},
        {"alpha_pattern": {"q_proj)|(x": 2}},
        {"alpha_pattern": {"[z-a]": 2}},
        {"alpha_pattern": {"(?=q)q_proj": 2}},
        {"rank_pattern": {"q_proj": -1}},
        {"base_model_name_or_path": 3},
    ],
    ids=str,
)
def test_what_would_be_merged_wrongly_is_refused_by_name(base, tmp_path, settings):
    adapter = write(tmp_path / "adapter", factors(base), base, **settings)
    with pytest.raises(CheckpointError) as caught:
        load(adapter)
    key = "rank" if settings == {"r": 8} else next(iter(settings))
    assert key in str(caught.value) and "adapter" in str(caught.value) and len(str(caught.value).splitlines()) < 9


def test_tensors_without_a_place_are_listed_ten_at_most(base, tmp_path):
    stray = {
        f"base_model.model.model.text_model.layers.{n}.self_attn.q_proj.lora_A.weight": np.ones((4, 48)) for n in range(40)
    }
    stray = {name: value.astype(np.float32) for name, value in stray.items()}
    for tensors, message in (
        (stray, r"40 tensors of the adapter .*\n(.*\n){10}  … and 30 more"),
        ({next(iter(stray)): np.ones((4, 48), np.float32)}, "lora_B is missing"),
        (factors(base) | {f"base_model.model.{QUERY}.lora_B.weight": np.ones((48, 3), np.float32)}, "do not make .48, 48."),
        (factors(base) | {f"base_model.model.{QUERY}.lora_A.weight": np.ones((), np.float32)}, "are no matrices"),
        (factors(base) | {f"base_model.model.{QUERY}.lora_A.default.weight": np.ones((4, 48), np.float32)}, "has it twice"),
        ({"base_model.model.lm_head.weight": np.ones((9, 9), np.float32)}, r"the base has the shape .160, 48."),
        ({f"base_model.model.{QUERY}.lora_magnitude_vector": np.ones(9, np.float32)}, "lora_A is missing"),
        (factors(base) | {f"base_model.model.{QUERY}.lora_magnitude_vector": np.ones(48, np.float32)}, "does not say use_dora"),
        (factors(base) | {f"base_model.model.{QUERY}.lora_B.bias": np.ones(48, np.float32)}, "does not say lora_bias"),
        ({f"base_model.model.{WORDS}.{ROWS}": np.ones((1, 48), np.float32)}, "is no list of different rows of 160"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(write(tmp_path / "adapter", tensors, base))


def test_rows_and_biases_that_do_not_fit(base, tmp_path):
    rows = lambda count: {f"base_model.model.{WORDS}.{ROWS}": np.ones((count, 48), np.float32)}
    for indices in ([3, 3], [160], [-1], [True], "3", {"lm_head": [1]}):
        with pytest.raises(CheckpointError, match="is no list of different rows of 160"):
            load(write(tmp_path / "adapter", rows(1), base, trainable_token_indices=indices))
    with pytest.raises(CheckpointError, match=r"it has the shape \(1, 48\), trainable_token_indices says \(2, 48\)"):
        load(write(tmp_path / "adapter", rows(1), base, trainable_token_indices={"embed_tokens": [3, 7]}))
    bias = {f"base_model.model.{QUERY}.lora_B.bias": np.ones(48, np.float32)}
    with pytest.raises(CheckpointError, match="lora_bias: the base has no bias there"):
        load(write(tmp_path / "adapter", factors(base, (QUERY,)) | bias, base, lora_bias=True))
    bias = {f"base_model.model.{PATCHES}.lora_B.bias": np.ones(9, np.float32)}
    with pytest.raises(CheckpointError, match=r"lora_B\.bias \(9,\) does not fit \(32,\)"):
        load(write(tmp_path / "adapter", factors(base, (PATCHES,)) | bias, base, lora_bias=True))


def test_an_adapter_in_the_wrong_company(base, tmp_path):
    adapter = write(tmp_path / "adapter", factors(base), base)
    shutil.copy(base / "model.safetensors", adapter)
    with pytest.raises(CheckpointError, match="beside the weights of a whole model"):
        load(adapter)
    (adapter / "model.safetensors").unlink()
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"an adapter, without its adapter_config\.json"):
        load(adapter)
    shutil.copytree(base, tmp_path / "unmerged")
    save_file({**helpers.weights(base), **factors(base)}, tmp_path / "unmerged" / "model.safetensors")
    with pytest.raises(CheckpointError, match="adapters that are not merged"):
        load(tmp_path / "unmerged")


PREFIXES = ("module._orig_mod.", "base_model.model.", "_orig_mod.", "module.", "_orig_mod.module.", "module.base_model.model.")


@pytest.mark.parametrize("prefix", fast_first(2, PREFIXES))
def test_wrappers_of_a_model_are_not_part_of_its_names(base, tmp_path, prefix):
    weights = helpers.weights(base)
    source = Path(shutil.copytree(base, tmp_path / "wrapped"))
    save_file({prefix + name: value for name, value in weights.items()}, source / "model.safetensors")
    convert(source, tmp_path / "orbax", quiet=True)
    convert(tmp_path / "orbax", tmp_path / "back", quiet=True)
    assert helpers.bit_equal(helpers.weights(tmp_path / "back"), weights)


def test_wrappers_inside_a_model_and_in_an_index(tmp_path):
    base = helpers.make(tmp_path / "hf", shards=3)
    wanted = helpers.weights(base)
    wrap = lambda name: re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", "_fsdp_wrapped_module." + name)
    for path in base.glob("*.safetensors"):
        from safetensors.numpy import load_file

        save_file({wrap(name): value for name, value in load_file(path).items()}, path)
    index = base / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {wrap(name): file for name, file in data["weight_map"].items()}}))
    convert(base, tmp_path / "back", to="hf", quiet=True)
    assert helpers.bit_equal(helpers.weights(tmp_path / "back"), wanted)


def test_names_that_only_look_like_wrappers_stay():
    for name in (
        "model.text_model.norm.weight",
        "lm_head.weight",
        "model.connector.modality_projection.proj.weight",
        "a.module",
    ):
        assert plain_name(name) == name


def test_one_tensor_under_two_names_is_an_error(base, tmp_path):
    source = Path(shutil.copytree(base, tmp_path / "twice"))
    weights = helpers.weights(base)
    save_file({**weights, "module.lm_head.weight": weights["lm_head.weight"]}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight occurs twice"):
        load(source)


def test_small_files_are_the_bases_and_the_adapters_where_it_has_its_own(base, tmp_path):
    adapter = write(tmp_path / "adapter", factors(base), base)
    assert resolve(adapter) == base == resolve(adapter, base=base)
    (adapter / "tokenizer_config.json").write_text('{"mine": 1}')
    (adapter / "config.json").write_text("not a model's")
    directory = resolve(adapter)
    assert (directory / "tokenizer_config.json").read_text() == '{"mine": 1}'
    assert (directory / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert not list(directory.glob("*.safetensors"))
    write(adapter, factors(base))
    with pytest.raises(CheckpointError, match="names no base: say which"):
        resolve(adapter)
    write(adapter, factors(base), adapter)
    with pytest.raises(CheckpointError, match="names itself"):
        resolve(adapter)
    for call in (resolve, load):
        with pytest.raises(InputError, match="no PEFT adapter"):
            call(base, base=base)


def test_a_base_takes_an_adapter_by_name(base, tmp_path):
    adapter = write(tmp_path / "adapter", factors(base), Path("somebody/else"))
    for a, b in zip(jax.tree.leaves(load(base, adapter=adapter)[1]), jax.tree.leaves(load(adapter, base=base)[1]), strict=True):
        assert np.array_equal(a, b)
    with pytest.raises(InputError, match="no PEFT adapter: it has no adapter_config"):
        load(adapter, adapter=base)
    with pytest.raises(InputError, match="two bases"):
        load(base, adapter=adapter, base=base)
    assert helpers.call("convert", base, tmp_path / "merged", "--adapter", adapter, "--to", "hf", "--quiet") == 0
    assert close(tmp_path / "merged", by_hand(base, factors(base), 1.5))


PEFT = [
    {"target_modules": ["q_proj", "o_proj", "fc1"]},
    {"target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"], "use_rslora": True},
    {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 3}},
    {"target_modules": ["k_proj", "proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "o_proj", "fc2", "gate_proj"], "use_dora": True},
    {"target_modules": ["patch_embedding", "q_proj"], "use_dora": True},
    {"target_modules": ["out_proj"], "bias": "lora_only"},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": r".*(text_model|vision_model).*\.(q|o)_proj$"},
    {"target_modules": "all-linear", "exclude_modules": r".*connector.*"},
    {
        "target_modules": ["q_proj", "v_proj", "fc1"],
        "rank_pattern": {r"text_model\.layers\.[01]\.self_attn\.q_proj": 2, r".*vision.*(q|v)_proj": 3},
        "alpha_pattern": {r"^model\..+\.fc\d": 5, "v_proj": 9},
    },
    {"target_modules": r".*vision_model.*\.(q_proj|out_proj|fc2|patch_embedding)", "lora_bias": True, "use_rslora": True},
    {"target_modules": ["fc1"], "lora_bias": True, "bias": "lora_only"},
    {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 159]},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5], "lm_head": [7, 3]}},
]


@pytest.mark.thorough
@pytest.mark.parametrize("settings", PEFT, ids=str)
def test_peft_computes_the_same(base, tmp_path, settings):
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's: pip install 'smolvlm-jax[test]'")
    import torch
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.5 if "lora_B" in name else 0.1))
    adapted.save_pretrained(tmp_path)
    ids = np.array([[3, 5, *[helpers.IMAGE_TOKEN] * 16, 7, 9]])
    pixels = np.random.default_rng(0).normal(size=(1, 1, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        wanted = adapted(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels)).logits.numpy()
    ours, params = load(base, adapter=tmp_path)
    found = np.asarray(ours.apply({"params": params}, ids, pixel_values=pixels).logits)
    plain, weights = load(base)
    assert np.abs(np.asarray(plain.apply({"params": weights}, ids, pixel_values=pixels).logits) - wanted).max() > 1e-2
    assert np.abs(found - wanted).max() <= 5e-5 * np.abs(wanted).max()


@pytest.fixture(scope="module")
def tiny_adapter(tmp_path_factory) -> Path:
    """For the bundled checkpoint, large enough to change its answers, without any other file."""
    rng, tensors = np.random.default_rng(4), {}
    for number in range(2):
        module = f"base_model.model.model.text_model.layers.{number}.mlp.down_proj"
        outside, inside = helpers.weights(resolve("tiny"))[f"{module.removeprefix('base_model.model.')}.weight"].shape
        tensors[f"{module}.lora_A.weight"] = rng.normal(0, 0.5, (4, inside)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.normal(0, 0.5, (outside, 4)).astype(np.float32)
    return write(tmp_path_factory.mktemp("tiny") / "adapter", tensors, resolve("tiny"))


@pytest.mark.thorough
def test_generate_and_batch_take_adapters(tiny_adapter, tmp_path, capsys):
    from smolvlm_jax import SmolVLMProcessor, generate
    from smolvlm_jax.batch import BatchConfig, run_batch
    from smolvlm_jax.cli import main
    from smolvlm_jax.generation_config import SamplingParams

    def asked(*words: object) -> str:
        assert main(["generate", "Name a number.", "--max-new-tokens", "8", *map(str, words)]) == 0
        return capsys.readouterr().out.strip()

    processor = SmolVLMProcessor.from_pretrained(resolve("tiny"))
    inputs = processor.encode_chat([{"role": "user", "content": "Name a number."}])
    model, params = load("tiny", adapter=tiny_adapter)
    ids = generate(model, params, **inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    whole = lambda text: text.rstrip("\ufffd").strip()  # the command shows no part of a character
    wanted = whole(processor.decode(ids, skip_special_tokens=True))
    nameless = write(tmp_path / "nameless", tensors_of(tiny_adapter))
    assert asked("--adapter", tiny_adapter) == asked("--model", tiny_adapter) == wanted != asked()
    assert asked("--model", "tiny", "--adapter", nameless) == asked("--model", nameless, "--base", "tiny") == wanted
    for words in (["--base", "tiny"], ["--model", "tiny", "--adapter", str(nameless), "--base", "tiny"], ["--adapter", "tiny"]):
        assert main(["generate", "x", *words]) == 2
    assert main(["generate", "x", "--model", str(nameless)]) == 2
    assert "names no base: say which, with --base" in capsys.readouterr().err

    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "Name a number."}\n')
    settings = dict(input=tmp_path / "in.jsonl", workers=0, quiet=True, slots=(8,), ring_lengths=(256,))
    sampling = SamplingParams(max_new_tokens=8)
    for output, named in (("one", {"model": tiny_adapter}), ("two", {"model": "tiny", "adapter": nameless})):
        run_batch(BatchConfig(output=tmp_path / output, sampling=sampling, **settings, **named))
        (row,) = next((tmp_path / output).glob("part-*")).read_text().splitlines()
        assert whole(json.loads(row)["text"]) == wanted
    # another base, or the same adapter on none, is another job
    with pytest.raises(InputError, match="another job: model was"):
        run_batch(BatchConfig(output=tmp_path / "two", model="tiny", sampling=sampling, **settings))


def tensors_of(adapter: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(adapter / "adapter_model.safetensors")
