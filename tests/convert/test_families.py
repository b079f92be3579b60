"""Checkpoints of other families, each against its own reference on random weights."""

import json
import shutil
from pathlib import Path

import convert_helpers as helpers
import nano_reference as nano
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from smolvlm_jax.checkpoint import load, resolve
from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.convert.verify import verify
from smolvlm_jax.errors import CheckpointError, ConfigError
from smolvlm_jax.parameters import flatten_params
from smolvlm_jax.processing import SmolVLMProcessor

torch = pytest.importorskip("torch", reason="the references run on torch: pip install 'smolvlm-jax[test]'")


def same(a, b) -> bool:
    a, b = flatten_params(a), flatten_params(b)
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def there_and_back(source: Path, folder: Path) -> None:
    """To orbax, to our Hugging Face layout, and compared with the original."""
    convert(source, folder / "orbax", quiet=True, notify=lambda line: None)
    convert(folder / "orbax", folder / "back", quiet=True)
    for other in ("orbax", "back"):
        report = verify(source, folder / other, quiet=True)
        assert report.same and all(row.status == "equal" for row in report.tensors)


# ---- nanoVLM


def nano_tokenizer(directory: Path, vocabulary: int = 150) -> Path:
    """A tokenizer like SmolLM2's: byte-level, with its own stop token, and `vocabulary` ids."""
    helpers.add_processor(directory)
    data = json.loads((directory / "tokenizer.json").read_text())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < vocabulary]
    (directory / "tokenizer.json").write_text(json.dumps(data))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (directory / name).unlink()
    config = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return nano_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def nano_ids(tiles: int) -> np.ndarray:
    return np.array([3, 5, *([nano.GLOBAL, *[nano.IMAGE] * 16] * tiles), 7, 9, 11])


@pytest.mark.parametrize("tied", [True, False])
def test_nanovlm_computes_what_its_own_code_does(tmp_path, tokenizer, tied):
    tensors = nano.write(tmp_path / "nano", lm_tokenizer=str(tokenizer), lm_tie_weights=tied)
    model, params = load(tmp_path / "nano")
    pixels = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
    wanted = nano.logits({**nano.CONFIG}, tensors, nano_ids(2), np.einsum("ihwc->ichw", pixels).astype(np.float32) / 255)
    found = np.asarray(model.apply({"params": params}, nano_ids(2)[None], pixel_values=pixels).logits)[0]
    assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()
    assert model.config.tie_word_embeddings == tied and model.config.text_config.rope_theta == 10000
    assert model.generation_config.stop_tokens == (2,)


def test_nanovlm_becomes_a_smolvlm_that_transformers_reads(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    tensors = nano.write(tmp_path / "nano", lm_tokenizer=str(tokenizer))
    there_and_back(tmp_path / "nano", tmp_path)
    with helpers.transformers_warnings() as warned:
        theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert not warned
    pixels = np.random.default_rng(1).random((1, 3, 32, 32), np.float32)
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor(nano_ids(1)[None]), pixel_values=torch.tensor(2 * pixels - 1)[None]).logits[0]
    wanted = nano.logits(nano.CONFIG, tensors, nano_ids(1), pixels)
    assert np.abs(out.numpy() - wanted).max() <= 2e-5 * np.abs(wanted).max()
    names = {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"}
    assert names | {"generation_config.json"} <= {path.name for path in (tmp_path / "back").iterdir()}


SIZES = [(96, 96), (70, 33), (33, 70), (20, 20), (300, 40), (32, 96), (31, 97)]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("largest", [True, False])
def test_nanovlm_cuts_pictures_as_its_own_code_does(tmp_path, tokenizer, whole, largest):
    tokens = {"image_token": "<|image|>", **({"global_image_token": "<|global_image|>"} if whole else {})}
    tokens |= {f"r{row}c{col}": f"<row_{row}_col_{col}>" for row in range(1, 9) for col in range(1, 9)}
    config = {**nano.CONFIG, "lm_tokenizer": str(tokenizer), "vlm_extra_tokens": tokens, "resize_to_max_side_len": largest}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = SmolVLMProcessor.from_pretrained(resolve(tmp_path))
    rng = np.random.default_rng(3)
    for size in SIZES:
        picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
        wanted, grid = nano.cut(picture, config, whole)
        found = processor.image_processor([picture], pixel_format="uint8", return_row_col_info=True)
        ours = np.einsum("ihwc->ichw", found["pixel_values"]) / 255
        assert ours.shape == wanted.shape, size
        many = whole and len(wanted) > 1
        assert np.abs(ours[many:] - wanted[many:]).max() <= 1e-6, "the tiles of the grid are equal"
        # the whole picture is resized in float there and rounded to 8 bits here
        assert not many or np.abs(ours[0] - wanted[0]).max() <= 1 / 255
        assert processor.count_tokens(*size) == len(wanted) * 16
        assert processor.media_tokens.pictures([[(found["rows"][0][0], found["cols"][0][0])]]) == [
            nano.words([grid], 16, whole)
        ]


def test_nanovlm_prompts_are_its_own(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    nano.write(tmp_path, lm_tokenizer=str(tokenizer))
    directory = resolve(tmp_path)
    processor = SmolVLMProcessor.from_pretrained(directory)
    pictures = [Image.new("RGB", size, "red") for size in ((96, 40), (32, 32))]
    grids = [nano.cut(picture, nano.CONFIG, True)[1] for picture in pictures]
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": "Which is larger?"}]
    found = processor.encode_chat([{"role": "user", "content": content}])
    text = f"<|im_start|>user\n{nano.words(grids, 16, True)}Which is larger?<|im_end|>\n<|im_start|>assistant\n"
    given = json.loads((directory / "tokenizer_config.json").read_text())["extra_special_tokens"]
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer, extra_special_tokens=given)
    assert (theirs.image_token_id, theirs.global_image_token_id) == (nano.IMAGE, nano.GLOBAL)
    assert found["input_ids"][0].tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    assert processor.image_token_id == nano.IMAGE
    assert int((found["input_ids"] == nano.IMAGE).sum()) == int(found["num_tiles"]) * 16


def test_nanovlm_without_its_tokenizer_still_has_its_weights(tmp_path, tokenizer):
    nano.write(tmp_path / "nano", lm_tokenizer=str(tmp_path / "nowhere"))
    with pytest.warns(UserWarning, match="there will be no tokenizer: .*names the tokenizer .*nowhere"):
        _, without = load(tmp_path / "nano")
    with pytest.raises(CheckpointError, match="names the tokenizer"):
        resolve(tmp_path / "nano")
    nano.write(tmp_path / "with", lm_tokenizer=str(tokenizer))
    assert same(without, load(tmp_path / "with")[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vit_cls_flag": True}, "vit_cls_flag = True is not supported: the encoder has no class token"),
        ({"lm_attn_scaling": 0.5}, "lm_attn_scaling = 0.5 is not supported"),
        ({"lm_use_tokens": True}, "lm_use_tokens"),
        ({"lm_moe_experts": 4}, "lm_moe_experts = 4 is not supported: nanoVLM has no such key"),
        ({"mp_image_token_length": 49}, "mp_image_token_length = 49 is not supported: a tile makes 16"),
        ({"max_img_size": 100}, "max_img_size = 100 is not supported"),
        ({"lm_n_heads": "6"}, "lm_n_heads = '6' is not supported: it must be a value like 15"),
        ({"vlm_extra_tokens": {}}, "vlm_extra_tokens"),
        ({"vlm_extra_tokens": {"image_token": "<i>", "r1c1": "<x>"}}, "the token r1c1 of the grid"),
        ({"lm_vocab_size": 150}, "from before nanoVLM had such a token"),
    ],
    ids=str,
)
def test_what_nanovlm_may_ask_for_and_is_not_computed_is_refused_by_name(tmp_path, changes, words):
    (tmp_path / "config.json").write_text(json.dumps({**nano.CONFIG, "lm_tokenizer": "/nowhere", **changes}))
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=words):
        load(tmp_path)


def test_nanovlm_tensors_are_used_once_each(tmp_path):
    tensors = nano.write(tmp_path, lm_tokenizer="/nowhere")
    qkv = "vision_encoder.blocks.1.attn.qkv_proj.weight"
    for changed, words in (
        ({**tensors, "decoder.blocks.0.attn.q_norm.weight": np.ones(8, np.float32)}, "surplus   decoder.blocks.0.attn.q_norm"),
        ({name: tensor for name, tensor in tensors.items() if name != qkv}, f"missing   {qkv}"),
        ({**tensors, qkv: tensors[qkv][:64]}, f"misshapen {qkv}: file has .64, 32., config says .96, 32."),
        ({**tensors, "decoder.rotary_embd.inv_freq": np.ones(4, np.float32)}, "inv_freq is not what lm_re_base = 10000 makes"),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path)


# ---- SmolVLA


def policy(folder: Path, layers: int = 1, **changes) -> tuple[Path, Path]:
    """A VLM of two layers of text, and a policy that keeps some of them, with an action expert beside it."""
    vlm = helpers.make(folder / "vlm")
    helpers.add_processor(vlm)
    weights = {
        f"model.vlm_with_expert.vlm.{name}": tensor
        for name, tensor in helpers.weights(vlm).items()
        if not any(f"text_model.layers.{number}." in name for number in range(layers, 9))
    }
    expert = (
        "model.vlm_with_expert.lm_expert.layers.0.mlp.up_proj.weight",
        "model.state_proj.weight",
        "model.action_in_proj.bias",
    )
    more = {name: np.ones((3, 2), np.float32) for name in expert} | {"normalize_inputs.buffer.mean": np.zeros(2, np.float32)}
    (folder / "policy").mkdir()
    save_file({**weights, **more}, folder / "policy" / "model.safetensors")
    config = {"type": "smolvla", "vlm_model_name": str(vlm), "num_vlm_layers": layers, "chunk_size": 50, **changes}
    (folder / "policy" / "config.json").write_text(json.dumps(config))
    return vlm, folder / "policy"


@pytest.mark.thorough
def test_the_backbone_of_smolvla_is_the_vlm_with_fewer_layers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    vlm, smolvla = policy(tmp_path)
    with pytest.warns(UserWarning) as warned:
        model, params = load(smolvla)
    told = [str(line.message) for line in warned]
    assert any("the action expert (3 tensors), which is left out" in line for line in told)
    assert any("statistics of states and actions (1 tensors)" in line for line in told)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(vlm, dtype=torch.float32)
    theirs.model.text_model.layers = theirs.model.text_model.layers[:1]  # as lerobot shortens it
    ids = np.array([[3, 5, *[helpers.IMAGE_TOKEN] * 16, 7, 9]])
    pixels = np.random.default_rng(0).normal(size=(1, 1, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels), use_cache=False).logits.numpy()
    found = np.asarray(model.apply({"params": params}, ids, pixel_values=pixels).logits)
    assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()
    assert model.config.text_config.num_hidden_layers == 1
    assert SmolVLMProcessor.from_pretrained(resolve(smolvla)).image_token_id == helpers.IMAGE_TOKEN


@pytest.mark.thorough
def test_a_policy_converts_and_what_is_unknown_in_it_is_refused(tmp_path):
    vlm, smolvla = policy(tmp_path)
    there_and_back(smolvla, tmp_path)
    told: list[str] = []
    convert(smolvla, tmp_path / "orbax", quiet=True, force=True, notify=told.append)
    assert any("action expert" in line for line in told)
    # the VLM cannot be had: its config.json is passed instead
    config = json.loads((smolvla / "config.json").read_text())
    (smolvla / "config.json").write_text(json.dumps({**config, "vlm_model_name": "nobody/nothing"}))
    with pytest.raises(CheckpointError, match=r"SmolVLA policy, and of the VLM that it names, nobody/nothing, .*--config"):
        convert(smolvla, tmp_path / "again", quiet=True)
    convert(smolvla, tmp_path / "again", quiet=True, config=vlm / "config.json", notify=lambda line: None)
    assert verify(tmp_path / "again", tmp_path / "orbax", quiet=True).same
    tensors = helpers.weights(smolvla)
    save_file({**tensors, "model.value_head.weight": np.ones(3, np.float32)}, smolvla / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"surplus   model\.value_head\.weight"):
        convert(smolvla, tmp_path / "never", quiet=True, config=vlm / "config.json")


# ---- Idefics3


def idefics3(directory: Path) -> Path:
    """A small Idefics3 as its 8B is built: Llama 3's rotary scaling, a list of stop tokens, leftovers in its config."""
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    rope = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64}
    text = {**helpers.TEXT, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": {**rope, "rope_type": "llama3"}}
    stops = {"bos_token_id": 1, "eos_token_id": [11, 12, 13], "perceiver_config": {"qk_layer_norms_perceiver": False}}
    config = transformers.Idefics3Config(
        vision_config=dict(helpers.VISION), text_config={**text, **stops}, scale_factor=2, image_token_id=helpers.IMAGE_TOKEN
    )
    torch.manual_seed(0)
    model = transformers.Idefics3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return directory


def test_idefics3_computes_what_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    source = idefics3(tmp_path / "hf")
    model, params = load(source)
    assert model.config.model_type == "idefics3" and model.config.text_config.eos_token_id == (11, 12, 13)
    assert model.config.text_config.rope_scaling.rope_type == "llama3"
    theirs = transformers.Idefics3ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    # beyond the original context, where the scaling counts
    ids = np.array([[3, 5, *[helpers.IMAGE_TOKEN] * 32, *(np.arange(150) % 140 + 3)]])
    pixels = np.random.default_rng(0).normal(size=(1, 2, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels)).logits.numpy()
    found = np.asarray(model.apply({"params": params}, ids, pixel_values=pixels).logits)
    assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()


@pytest.mark.thorough
def test_idefics3_goes_there_and_back_and_stops_at_each_of_its_stop_tokens(tmp_path):
    from smolvlm_jax import generate

    source = idefics3(tmp_path / "hf")
    there_and_back(source, tmp_path)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["text_config"]["eos_token_id"] == [11, 12, 13]
    model, params = load(source)
    assert set(model.generation_config.stop_tokens) == {11, 12, 13}
    ids = np.array([[3, 5, 7]])
    drawn = generate(model, params, ids, max_new_tokens=6, do_sample=False, eos_token_id=())[0, 3:].tolist()
    stop = next(token for token in drawn if token != drawn[0])
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [11, stop, 13]}))
    model, params = load(source)
    found = generate(model, params, ids, max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    assert found[: drawn.index(stop) + 1] == drawn[: drawn.index(stop) + 1] and len(found) == drawn.index(stop) + 1


# ---- retrieval: ColIdefics3


def retrieval(directory: Path, name: str = "linear") -> tuple[Path, "torch.nn.Module", "torch.nn.Linear"]:
    """A small ColSmolVLM: the base class of Idefics3 with a projection to 128 numbers."""
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    source = helpers.make(directory, "idefics3")
    base = transformers.Idefics3Model.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(5)
    linear = torch.nn.Linear(helpers.TEXT["hidden_size"], 128)
    tensors = {key: value for key, value in helpers.weights(source).items() if key != "lm_head.weight"}
    tensors |= {f"{name}.weight": linear.weight.detach().numpy(), f"{name}.bias": linear.bias.detach().numpy()}
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["ColIdefics3"]}))
    return source, base, linear


def their_vectors(base, linear, ids, mask, **pictures) -> np.ndarray:
    with torch.no_grad():
        hidden = base(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **pictures)[0]
        found = linear(hidden)
        return (found / found.norm(dim=-1, keepdim=True) * torch.tensor(mask)[..., None]).numpy()


@pytest.mark.parametrize("name", ["linear", pytest.param("custom_text_proj", marks=pytest.mark.thorough)])
def test_colsmolvlm_makes_the_vectors_of_its_reference(tmp_path, name):
    from smolvlm_jax import ColIdefics3, embed, max_sim

    source, base, linear = retrieval(tmp_path / "hf", name)
    model, params = load(source)
    assert isinstance(model, ColIdefics3) and model.config.embedding_dim == 128
    image = [helpers.IMAGE_TOKEN] * 16
    ids = np.array([[3, 5, *image, 7, 9], [2] * 2 + [3, *image, 9]])  # the second is padded on the left, as there
    mask = (ids != 2).astype(np.int64)
    pixels = np.random.default_rng(0).normal(size=(2, 1, 3, 32, 32)).astype(np.float32)
    wanted = their_vectors(base, linear, ids, mask, pixel_values=torch.tensor(pixels))
    pages = np.asarray(embed(model, params, ids, mask, pixel_values=pixels))
    assert pages.shape == (2, 20, 128) and np.abs(pages - wanted).max() <= 2e-5
    assert not pages[1, :2].any() and np.allclose(np.linalg.norm(pages[mask == 1], axis=-1), 1, atol=1e-5)
    only = np.asarray(embed(model, params, ids, mask, pixel_values=pixels, images_only=True))
    assert np.abs(only - wanted * (ids == helpers.IMAGE_TOKEN)[..., None]).max() <= 2e-5
    queries = np.array([[4, 8, 12, 2, 2], [5, 6, 7, 8, 9], [9, 9, 2, 2, 2]])
    padded = (queries != 2).astype(np.int64)
    asked = their_vectors(base, linear, queries, padded)
    scores = np.einsum("bnd,csd->bcns", asked, wanted).max(-1).sum(-1)
    assert np.abs(np.asarray(max_sim(embed(model, params, queries, padded), pages)) - scores).max() <= 1e-4


@pytest.mark.thorough
def test_colsmolvlm_goes_there_and_back_and_makes_no_text(tmp_path):
    from smolvlm_jax import embed, generate
    from smolvlm_jax.errors import InputError

    source, *_ = retrieval(tmp_path / "hf")
    there_and_back(source, tmp_path)
    assert helpers.bit_equal(helpers.weights(tmp_path / "back"), helpers.weights(source))
    model, params = load(tmp_path / "orbax", check=True)
    ids = np.array([[3, 5, 7]])
    with pytest.raises(InputError, match=r"makes vectors and no text: call embed\(\)"):
        generate(model, params, ids)
    with pytest.raises(InputError, match="stages of a retrieval model"):
        verify(source, tmp_path / "back", stages=True, quiet=True)
    plain, weights = load(helpers.make(tmp_path / "plain"))
    with pytest.raises(InputError, match="makes text and no vectors"):
        embed(plain, weights, ids)
    shutil.rmtree(tmp_path / "plain")
