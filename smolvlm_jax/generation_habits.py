"""Arguments that only transformers' generate has: accepted with values that change nothing, refused by name with others."""

import functools
from dataclasses import fields
from typing import Any

from .habits import ANY, Neutral, unasked

__all__ = ["ELSEWHERE", "INSTEAD", "OF_A_CALL", "OTHERS", "refuses_by_name"]

_STOPS = "it ends at tokens, eos_token_id; texts end answers in the engine, SamplingParams(stop=…), and with --stop in commands"
_PROMPTS = "a processor makes arrays of them: inputs = processor.encode_chat(messages), then generate(model, params, **inputs)"
_STRATEGIES = "there is greedy search, and sampling: do_sample=True, top_p=…"
_FILTERS = "sampling has top_k, top_p and min_p"

# Settings of transformers that change what is generated, and do not exist here.
OTHERS: dict[str, Neutral] = {
    **dict.fromkeys(("num_beams", "num_beam_groups"), Neutral((1,), _STRATEGIES)),
    **dict.fromkeys(("penalty_alpha", "diversity_penalty"), Neutral((0,), _STRATEGIES)),
    **dict.fromkeys(("constraints", "force_words_ids", "dola_layers"), Neutral((), _STRATEGIES)),
    **dict.fromkeys(("typical_p", "top_h"), Neutral((1,), _FILTERS)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), Neutral((0,), _FILTERS)),
    **dict.fromkeys(("guidance_scale", "encoder_repetition_penalty"), Neutral((1,))),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), Neutral((0,))),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "sequence_bias"), Neutral(([], {}))),
    "stop_strings": Neutral(([],), _STOPS),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), Neutral()),
    **dict.fromkeys(("max_time", "watermarking_config"), Neutral()),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values", "token_healing"), Neutral((False,))),
}
# Methods of transformers' config, and what to type instead.
INSTEAD = {
    "update": "config.replace(name=value) gives a changed copy",
    "push_to_hub": "save_pretrained(directory), then huggingface_hub's upload_folder",
    "validate": "values are checked when a config is made",
}
# Arguments of other libraries.
ELSEWHERE: dict[str, Neutral] = {
    **dict.fromkeys(("stop", "stop_words", "stop_sequences"), Neutral(([],), _STOPS)),
    **dict.fromkeys(("images", "image", "videos", "video", "messages", "conversation"), Neutral((), _PROMPTS)),
    **dict.fromkeys(("prompt", "prompts", "text"), Neutral((), _PROMPTS)),
}
_EITHER = Neutral((True, False))
# Further arguments of transformers' generate. In a file they say nothing about what is generated.
OF_A_CALL: dict[str, Neutral] = {
    "inputs": Neutral((), "it is called input_ids"),
    "logits_processor": Neutral(([],)),
    "stopping_criteria": Neutral(([],), "the engine's SamplingParams has stop, and stream() can be left at any token"),
    **dict.fromkeys(("streamer", "tokenizer"), Neutral((), "stream() yields tokens as they are drawn")),
    **dict.fromkeys(("prefix_allowed_tokens_fn", "assistant_model", "assistant_tokenizer", "custom_generate"), Neutral()),
    **dict.fromkeys(("negative_prompt_ids", "negative_prompt_attention_mask", "use_model_defaults"), Neutral()),
    **dict.fromkeys(("past_key_values", "cache", "decoder_input_ids", "encoder_outputs", "mm_encoder_outputs"), Neutral()),
    **dict.fromkeys(("position_ids", "cache_position", "token_type_ids", "labels"), Neutral()),
    **dict.fromkeys(("synced_gpus", "output_attentions", "output_hidden_states", "low_memory"), Neutral((False,))),
    **dict.fromkeys(("use_cache", "early_stopping", "disable_compile", "use_mtp", "trust_remote_code"), _EITHER),
    "logits_to_keep": Neutral((0, 1)),
    "length_penalty": Neutral((1,), "it is a setting of beams"),
    "cache_implementation": Neutral(("static", "dynamic")),
    **dict.fromkeys(("cache_config", "max_cache_len", "compile_config", "continuous_batching_config"), Neutral(({},))),
    **dict.fromkeys(("prefill_chunk_size", "is_assistant", "assistant_early_exit", "speculation_type"), Neutral((False,))),
    # settings of an assistant model, without which they say nothing
    **dict.fromkeys(("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"), Neutral(ANY)),
    **dict.fromkeys(("max_matching_ngram_size", "assistant_ensemble_weight"), Neutral(ANY)),
    **dict.fromkeys(("assistant_lookbehind", "target_lookbehind"), Neutral(ANY)),
    **dict.fromkeys(("prompt_lookup_num_tokens", "decoder_start_token_id"), Neutral()),
    "bos_token_id": Neutral(ANY),  # transformers begins with it where there is no prompt
    **dict.fromkeys(("transformers_version", "_from_model_config"), Neutral()),
    "renormalize_logits": Neutral((False,)),
}


def refuses_by_name(cls: Any) -> None:
    """Let the constructor take further arguments of transformers with values that ask for nothing."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(
            self,
            *args,
            **unasked(cls.__name__, kwargs, {**OTHERS, **OF_A_CALL, **ELSEWHERE}, {field.name for field in fields(cls)}),
        )

    cls.__init__ = __init__
