"""A checkpoint that writes given DocTags, whatever it is shown: for tests of what becomes of them.

Each token of the answer is followed by one other, so the weights are a table: a token's embedding is a direction of its own,
which the head turns into the next token. The layers have random weights and add nothing.
"""

import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
from tokenizers import AddedToken, Tokenizer

from smolvlm_jax import SmolVLMConfig, SmolVLMForConditionalGeneration, abstract_params, resolve, save_hf
from smolvlm_jax.io import COMPANIONS
from smolvlm_jax.parameters import flatten_params
from smolvlm_jax.processing import SmolVLMProcessor

PAGE = "<doctag><section_header_level_1><loc_7>Big</section_header_level_1></doctag>"
TAGS = ("<doctag>", "</doctag>", "<section_header_level_1>", "</section_header_level_1>")
_WIDTH = 64


def write_checkpoint(folder: Path, source: Path | None = None, says: str = PAGE) -> Path:
    """Write a checkpoint.

    Args:
        folder: for it; made.
        source: has the files of its tokenizer and processor; by default the bundled checkpoint's, with TAGS added.
        says: the answer. No token occurs in it twice.
    """
    folder.mkdir()
    for name in COMPANIONS:
        if ((source or resolve("tiny")) / name).exists():
            shutil.copyfile((source or resolve("tiny")) / name, folder / name)
    if source is None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in TAGS])
        tokenizer.save(str(folder / "tokenizer.json"))
    processor = SmolVLMProcessor.from_pretrained(folder)
    tokenizer = processor.tokenizer
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "?"}]}], add_generation_prompt=True
    )
    config = json.loads(((source or resolve("tiny")) / "config.json").read_text())
    text = dict(hidden_size=_WIDTH, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    text |= dict(head_dim=16, vocab_size=len(tokenizer), tie_word_embeddings=False)
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config["text_config"] |= text
    config["vision_config"] |= vision
    config |= {"tie_word_embeddings": False, "vocab_size": len(tokenizer)}
    chain = [tokenizer.encode(prompt)[-1], *tokenizer.encode(says), tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain) <= _WIDTH
    model = SmolVLMForConditionalGeneration(SmolVLMConfig.from_dict(config))
    rng, shapes = np.random.default_rng(0), abstract_params(model)
    values = {path: 0.02 * rng.standard_normal(x.shape).astype(np.float32) for path, x in flatten_params(shapes).items()}
    layer = "model/text_model/layers_0"
    for path in (f"{layer}/self_attn/o_proj/kernel", f"{layer}/mlp/down_proj/kernel"):
        values[path][:] = 0
    values["model/text_model/norm/scale"][:] = 1
    table, head = values["model/text_model/embed_tokens/embedding"], values["lm_head/kernel"]
    for place, (token, after) in enumerate(itertools.pairwise(chain)):
        table[token] = np.eye(_WIDTH)[place]
        head[:, after] = 2 * np.eye(_WIDTH)[place]
    save_hf(folder / "weights", model, jax.tree.unflatten(jax.tree.structure(shapes), list(values.values())))
    for path in (folder / "weights").iterdir():
        path.rename(folder / path.name)
    (folder / "weights").rmdir()
    return folder
