"""Against transformers 5.23 running beside us, in float32: random configs at every stage, and the real 256M shape."""

import json

import jax
import numpy as np
import pytest
from tiers import fast_first

torch = pytest.importorskip("torch", reason="the reference: pip install 'smolvlm-jax[test]'")
transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")

from smolvlm_jax import (
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMVisionTransformer,
    abstract_params,
    generate,
    init_params,
    load,
    published_config,
    save_hf,
)
from smolvlm_jax.parameters import flatten_params

TOLERANCE = 2e-5


def reference(directory):
    """The same checkpoint in transformers, eager attention, evaluation mode."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def random_config(seed: int) -> SmolVLMConfig:
    """A small model of random proportions."""
    rng = np.random.default_rng(seed)
    scale = int(rng.choice([2, 3, 4]))
    patch, side = int(rng.choice([2, 4, 7])), scale * int(rng.integers(1, 4))
    heads, kv = [(4, 4), (4, 2), (6, 2), (3, 1), (9, 3)][int(rng.integers(5))]
    vision_heads = int(rng.choice([2, 3]))
    return SmolVLMConfig.from_dict(
        {
            "model_type": ["smolvlm", "idefics3"][seed % 2],
            "scale_factor": scale,
            "image_token_id": 90,
            "tie_word_embeddings": bool(seed % 3 == 0),
            "vision_config": {
                "hidden_size": vision_heads * 8,
                "intermediate_size": int(rng.integers(16, 64)),
                "num_hidden_layers": int(rng.integers(1, 4)),
                "num_attention_heads": vision_heads,
                "image_size": patch * side + int(rng.integers(0, patch)),
                "patch_size": patch,
            },
            "text_config": {
                "model_type": "llama",
                "hidden_size": 36,  # transformers wants a multiple of the heads, though head_dim is explicit
                "intermediate_size": int(rng.integers(24, 64)),
                "num_hidden_layers": int(rng.integers(1, 4)),
                "num_attention_heads": heads,
                "num_key_value_heads": kv,
                "head_dim": int(rng.choice([4, 6, 10])),
                "vocab_size": 96,
                "rms_norm_eps": 1e-5,
                "rope_theta": float(rng.choice([1e4, 1e5, 273768.0])),
                "max_position_embeddings": 512,
                "pad_token_id": 2,
            },
        }
    )


def scaled(params, seed: int, spread: float = 0.15):
    """Random parameters with some life in them: norms near 1, the rest of this spread, at which values stay below about 10
    and float32 leaves room for an absolute tolerance."""
    rng = np.random.default_rng(seed)
    draw = lambda path, x: (1 if path.endswith("scale") else 0) + spread * rng.standard_normal(x.shape).astype(np.float32)
    flat = {k: draw(k, v).astype(np.float32) for k, v in flatten_params(params).items()}
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [flat[k] for k in flatten_params(params)]) if leaves else params


@pytest.mark.parametrize("seed", fast_first(1, range(8)))
def test_random_configs_at_every_stage(seed, tmp_path):
    config = random_config(seed)
    model = SmolVLMForConditionalGeneration(config)
    save_hf(tmp_path / "m", model, scaled(abstract_params(model), seed))
    model, params = load(tmp_path / "m")
    theirs = reference(tmp_path / "m")
    size = config.vision_config.image_size
    rng = np.random.default_rng(100 + seed)
    image = [90] * config.image_seq_len
    text = lambda n: rng.integers(3, 90, n).tolist()
    # three pictures, one and none, padded on the left
    rows = [[*text(2), *image, *text(1), *image, *image, *text(2)], [*text(3), *image, *text(4)], text(5)]
    length = max(map(len, rows))
    ids = np.array([[2] * (length - len(r)) + r for r in rows])
    mask = np.array([[0] * (length - len(r)) + [1] * len(r) for r in rows])
    positions = np.where(mask == 0, 1, mask.cumsum(-1) - 1)
    pixels = rng.uniform(-1, 1, (3, 3, 3, size, size)).astype(np.float32)
    pixels[1, 1:] = 0
    pixels[2] = 0
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=pixels)
    labels = np.where((mask == 0) | (ids == 90), -100, ids)
    forward = jax.jit(model.apply, static_argnames=("output_hidden_states", "output_attentions"))
    ours = forward({"params": params}, **inputs, labels=labels, output_hidden_states=True, output_attentions=True)

    stages: dict[str, torch.Tensor] = {}
    keep = lambda name: lambda module, args, out: stages.__setitem__(name, out[0] if isinstance(out, tuple) else out)
    encoder = theirs.model.vision_model
    encoder.embeddings.register_forward_hook(keep("patch"))
    for l, layer in enumerate(encoder.encoder.layers):
        layer.register_forward_hook(keep(f"layer{l}"))
    encoder.post_layernorm.register_forward_hook(keep("post"))
    theirs.model.connector.register_forward_hook(keep("connector"))
    with torch.no_grad():
        tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
        want = theirs(**tensors, labels=torch.from_numpy(labels), output_hidden_states=True, output_attentions=True)

    flat = pixels.reshape(-1, 3, size, size)
    tiles = np.einsum("ichw->ihwc", flat[(flat != 0).any((1, 2, 3))])
    encoder = SmolVLMVisionTransformer(config.vision_config)
    vision = jax.jit(encoder.apply)({"params": params["model"]["vision_model"]}, tiles)
    pairs = [(vision.hidden_states[0], stages["patch"])]
    pairs += [(h, stages[f"layer{l}"]) for l, h in enumerate(vision.hidden_states[1:])]
    pairs += [(vision.last_hidden_state, stages["post"])]
    pairs += [(ours.image_hidden_states[: len(tiles)], stages["connector"])]
    for got, wanted in pairs:
        wanted = wanted.numpy().reshape(got.shape)
        assert np.abs(np.asarray(got) - wanted).max() <= TOLERANCE
        assert np.abs(wanted).max() > 0.05, "there is something to compare"
    real = mask == 1
    for got, wanted in [
        *zip(ours.hidden_states, want.hidden_states, strict=True),
        (ours.logits, want.logits),
    ]:
        wanted = wanted.numpy()[real]
        assert np.abs(np.asarray(got)[real] - wanted).max() <= TOLERANCE
        assert np.abs(wanted).max() > 0.05, "there is something to compare"
    for got, wanted in zip(ours.attentions, want.attentions, strict=True):
        assert np.abs(np.einsum("bnts->btns", got) - np.einsum("bnts->btns", wanted.numpy()))[real].max() <= TOLERANCE
    assert float(ours.loss) == pytest.approx(float(want.loss), rel=TOLERANCE)

    # row by row: a row alone equals the row in its batch
    for row in range(3):
        own = real[row]
        alone = dict(input_ids=ids[row : row + 1, own])
        tiles_of_row = pixels[row][(pixels[row] != 0).any((1, 2, 3))]
        if len(tiles_of_row):
            alone["pixel_values"] = tiles_of_row[None]
        single = forward({"params": params}, **alone).logits[0]
        batch = np.asarray(ours.logits)[row, own]
        assert np.abs(np.asarray(single) - batch).max() <= TOLERANCE


PROMPTS = [
    (0, [1, 11126, 42, 1606, 47, 49279, 198, 9519, 9531, 42]),
    (0, [1, 504, 2365, 282, 4649, 314]),
    (1, [1, 11126, 42, -1, 1780, 346, 2889, 47, 49279, 198, 9519, 9531, 42]),
    (2, [1, 11126, 42, -1, -1, 8135, 601, 1167, 47, 49279, 198, 9519, 9531, 42]),
    (1, [1, 9519, 28, -1, 198]),
]


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [0])
def test_the_256m_shape_logits_and_greedy_tokens(seed, tmp_path):
    """Random weights in the real shape: logits to 1e-3 of their spread, 64 greedy tokens the same on five prompts with no,
    one and two pictures, and the batch the same as its members."""
    # text ids within reach of the vocabulary, the spread chosen so that greedy choices are not near-ties
    config = published_config("SmolVLM-256M-Instruct")
    model = SmolVLMForConditionalGeneration(config)
    params = init_params(model, seed)
    head = params["lm_head"]["kernel"]
    params["lm_head"]["kernel"] = head * 4
    save_hf(tmp_path / "m", model, params)
    del params
    model, params = load(tmp_path / "m")
    theirs = reference(tmp_path / "m")
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=2)
    rng = np.random.default_rng(seed)
    for count, template in PROMPTS:
        block = [49189, 49152, *[49190] * 64, 49189]
        ids = np.array([[t for token in template for t in (block if token == -1 else [token])]])
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if count:
            inputs["pixel_values"] = rng.uniform(-1, 1, (1, count, 3, 512, 512)).astype(np.float32)
        tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
        with torch.no_grad():
            out = theirs.generate(
                **tensors, do_sample=False, max_new_tokens=64, output_logits=True, return_dict_in_generate=True
            )
            want = theirs(**tensors).logits.numpy()
        got = np.asarray(model.apply({"params": params}, **inputs).logits)
        assert np.abs(got - want).max() <= 1e-3 * want.std()
        tokens = generate(model, params, **inputs, max_new_tokens=64, eos_token_id=None)
        assert tokens[0, ids.shape[1] :].tolist() == out.sequences[0, ids.shape[1] :].tolist()


def test_published_small_print_survives_a_round_trip(tmp_path, published):
    """What we export from a published config transformers reads, and it is the model it read before."""
    config = SmolVLMConfig.from_pretrained(published / "SmolVLM-256M-Instruct")
    config.save_pretrained(tmp_path)
    before = transformers.AutoConfig.from_pretrained(published / "SmolVLM-256M-Instruct")
    after = transformers.AutoConfig.from_pretrained(tmp_path)
    for part in ("vision_config", "text_config"):
        a, b = getattr(before, part).to_dict(), getattr(after, part).to_dict()
        different = {k for k in a if k in b and a[k] != b[k] and k not in ("rope_parameters", "architectures")}
        assert not different, f"{part}: {json.dumps({k: (a[k], b[k]) for k in different}, default=str)}"
