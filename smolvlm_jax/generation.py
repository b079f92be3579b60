"""`generate()` and `stream()`: one jitted prefill, then a decode loop that stays on the device until every row has stopped.

Prompts and pictures are padded to buckets (prompt_arrays.py), and the length of the cache to a multiple of 64, off the CPU of
128, so that a handful of compiled programs serve all of them.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .cache import CacheFormat, KVCache, check_kv_cache_dtype
from .config import SmolVLMConfig
from .decoding import (
    Decoded,
    DecodeState,
    Rows,
    RowSettings,
    Rules,
    allowed,
    decode,
    measured,
    next_logits,
    next_token,
    tokens_seen,
)
from .errors import InputError
from .generation_config import GenerationConfig
from .generation_notices import OTHER_PARAMETERS, call_config, check_call, misfit, warn_of_room
from .logprobs import TokenLogprobs
from .model import SmolVLMForConditionalGeneration
from .outputs import ModelOutput
from .pictures import encoder_batch, encoder_batches, tokens_of
from .prompt_arrays import bucket, check_model, prompt_arrays
from .retrieval_model import require_text
from .sampling import processed
from .sharding import activate, batch_sharding

__all__ = ["GenerateOutput", "bucket", "generate", "stream"]

_Arguments = ParamSpec("_Arguments")
_Out = TypeVar("_Out")


@dataclass(frozen=True, kw_only=True)
class GenerateOutput(ModelOutput):
    """What `generate` returns with return_dict_in_generate or logprobs. Fields that were not asked for are None.

    Attributes:
        sequences: int32 (b, t + new), what `generate` returns otherwise.
        scores: for each new token (b, v) float32: what it was chosen by, with all settings applied. What a row has there
            after it has ended is of no meaning, here and in `logits`.
        logits: for each new token (b, v): the model's.
        past_key_values: the cache, with all tokens but the last.
        logprobs: a `TokenLogprobs` of the new tokens: `chosen` (b, new), and the k best (b, new, k); 0 where a row has ended.
    """

    sequences: np.ndarray
    scores: tuple[np.ndarray, ...] | None = None
    logits: tuple[np.ndarray, ...] | None = None
    past_key_values: KVCache | None = None
    logprobs: TokenLogprobs | None = None


class _Scores(NamedTuple):
    """What tokens are chosen by, (b, v) each: the scores after all settings, float32, and the model's logits."""

    scores: jax.Array
    logits: jax.Array

    @classmethod
    def of(cls, rules: Rules, rows: Rows, logits: jax.Array) -> "_Scores":
        settings: Any = rules.sampling
        return cls(processed(allowed(rules, rows, logits), settings, seen=rows.seen), logits)


class _Work:
    """Says what a call is doing.

    Args:
        report: called with that, in words, and where there are several of these with two numbers: which one, and how many.
        encoder_programs: how many sizes of batches are to be encoded.
    """

    def __init__(self, report: Callable[..., None] | None, encoder_programs: int):
        self._report = report
        self._compiled: set[Any] = set()
        self._programs = encoder_programs + 2

    def compiles(self, program: Any) -> None:
        """A program is called, for the first time if it is a new one."""
        if self._report is not None and program not in self._compiled:
            self._compiled.add(program)
            self._report("compiling", len(self._compiled), self._programs)

    def computes(self, what: str, *numbers: int, until: Any = None) -> None:
        """The device is at work, and is waited for, so that what is said next is true."""
        if self._report is not None:
            self._report(what, *numbers)
            jax.block_until_ready(until)


def _encoder_sizes(config: SmolVLMConfig, tiles: int) -> list[int]:
    """Batches in which so many tiles are encoded."""
    most = encoder_batch(config.vision_config, cpu=jax.default_backend() == "cpu")
    return list(encoder_batches(tiles, [most >> k for k in range(most.bit_length())]))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="features")
def _encode(model, params, features: jax.Array, tiles: jax.Array, mask: jax.Array | None, start: jax.Array) -> jax.Array:
    """Features (n, tokens, d), with those of these tiles from `start` on."""
    found = model.apply({"params": params}, tiles, mask, method="get_image_features").image_hidden_states
    return jax.lax.dynamic_update_slice(features, found.astype(features.dtype), (start, 0, 0))


def _encoded(model: SmolVLMForConditionalGeneration, params, inputs: dict[str, Any], work: "_Work") -> dict[str, Any]:
    """The inputs with features in place of tiles.

    Tiles are encoded in batches of a few sizes, none of it padding, so that 17 tiles cost 17 and not the 24 of a bucket; the
    features are padded to a bucket, so that the prefill of many numbers of tiles is one program.
    """
    inputs = dict(inputs)
    tiles, mask = inputs.pop("pixel_values"), inputs.pop("pixel_attention_mask", None)
    count = len(tiles)
    shape = (bucket(count, 1), tokens_of(model.config, tiles), model.config.text_config.hidden_size)
    features, start = jnp.zeros(shape, model.dtype), 0
    for size in _encoder_sizes(model.config, count):
        part = slice(start, start + size)
        piece = None if mask is None else mask[part]
        work.compiles(("encoder", size))
        features = _encode(model, params, features, tiles[part], piece, np.asarray(start, np.int32))
        work.computes("encoding tile", start + size, count, until=features)
        start += size
    return {**inputs, "image_hidden_states": features}


@functools.partial(jax.jit, static_argnames=("model", "rules", "cache_length", "stored", "scored"))
def _prefill(
    model,
    rules: Rules,
    cache_length: int,
    params,
    inputs: dict[str, Any],
    settings: RowSettings,
    stored: CacheFormat,
    *,
    scored: bool = False,
) -> tuple[Decoded, _Scores | None]:
    """Run the prompts, left-padded to one length, and draw the first token of each.

    Args:
        inputs: as in `PromptArrays`.
        scored: return what the tokens are chosen by, too.
    """
    inputs = dict(inputs)
    mask, ids, recent = inputs["attention_mask"], inputs.get("input_ids"), inputs.pop("recent", None)
    if "inputs_embeds" in inputs:
        inputs.pop("input_ids", None)
    positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    out = model.apply({"params": params}, **inputs, position_ids=positions, logits_to_keep=1, cache_length=mask.shape[1])
    logits, seen = out.logits[:, -1], None
    if rules.penalize:
        vocabulary = logits.shape[-1]
        seen = jnp.zeros(logits.shape, bool)
        seen = seen if ids is None else tokens_seen(ids, mask, segments=1, vocabulary=vocabulary)[:, 0]
    start = Rows.start(positions[:, -1], settings, seen=seen, recent=recent)
    rows = next_token(rules, start, logits)
    tokens = jnp.zeros((len(mask), cache_length - mask.shape[1]), jnp.int32).at[:, 0].set(rows.token)
    logprobs = measured(rules, rows, logits)
    if logprobs is not None:
        logprobs = TokenLogprobs.zeros(tokens.shape, rules.logprobs or 0).put(logprobs, 0)
    cache = out.past_key_values.stored_as(stored, cache_length)  # whose promise prompts that are aligned keep
    decoded = Decoded(DecodeState(rows, cache), tokens, jnp.ones((), jnp.int32), logprobs)
    return decoded, _Scores.of(rules, start, logits) if scored else None


@functools.partial(jax.jit, static_argnames=("model", "rules"), donate_argnames="state")
def _scored_step(
    model, rules: Rules, params, state: DecodeState, logprobs: TokenLogprobs | None, column: jax.Array
) -> tuple[DecodeState, _Scores, TokenLogprobs | None]:
    """`decode_step`, with what the tokens are chosen by; their log-probabilities are put into a column of `logprobs`."""
    logits, cache = next_logits(model, params, state)
    rows = next_token(rules, state.rows, logits)
    step = measured(rules, rows, logits)
    logprobs = None if logprobs is None or step is None else logprobs.put(step, column)
    return DecodeState(rows, cache), _Scores.of(rules, state.rows, logits), logprobs


_decode = jax.jit(decode, static_argnames=("model", "rules"), donate_argnames="decoded")


@dataclass
class _Run:
    """Prompts after their prefill: what `generate` and `stream` continue.

    Attributes:
        input_ids: int32 (b, t), as given.
        first: what the first tokens were chosen by, if that was asked for.
    """

    model: SmolVLMForConditionalGeneration
    params: Any
    config: GenerationConfig
    mesh: Mesh | None
    input_ids: np.ndarray
    decoded: Decoded
    first: _Scores | None

    @property
    def steps(self) -> int:
        """The most tokens that a row draws."""
        return self.config.max_new_tokens or 0

    def decode(self, end: int) -> None:
        """Decode until `end` columns are written, or every row has stopped: one program for any `end`."""
        rules, limit = Rules.of(self.config), np.asarray(end, np.int32)
        with activate(self.mesh):
            self.decoded = _decode(self.model, rules, self.params, self.decoded, limit)

    def decode_scored(self) -> list[Any]:
        """Decode to the end, one step at a time; what every token was chosen by, on the host."""
        rules, found, state = Rules.of(self.config), [jax.device_get(self.first)], self.decoded.state
        tokens, logprobs = [np.asarray(state.rows.token)], self.decoded.logprobs
        while len(found) < self.steps and not np.asarray(state.rows.finished).all():
            with activate(self.mesh):
                at = np.asarray(len(found), np.int32)
                state, scores, logprobs = _scored_step(self.model, rules, self.params, state, logprobs, at)
            found.append(jax.device_get(scores))
            tokens.append(np.asarray(state.rows.token))
        columns = np.asarray(len(tokens), np.int32)
        self.decoded = Decoded(state, np.stack(tokens, axis=1), columns, logprobs)  # type: ignore[arg-type]
        return found

    def sequences(self) -> np.ndarray:
        """int32 (b, t + new): the prompts as given and their answers, rows that ended early filled with the pad token."""
        tokens, drawn, columns = jax.device_get((self.decoded.tokens, self.decoded.state.rows.drawn, self.decoded.columns))
        own = np.arange(columns) < drawn[:, None]
        answers = np.where(own, tokens[:, :columns], np.int32(self.config.fill_token_id))
        return np.concatenate([self.input_ids, answers], axis=1)

    def logprobs(self) -> TokenLogprobs | None:
        """Log-probabilities (b, new) of the answers' tokens on the host, if they were asked for."""
        found, drawn, columns = jax.device_get((self.decoded.logprobs, self.decoded.state.rows.drawn, self.decoded.columns))
        first = jax.tree.map(lambda x: x[:, :columns], found)
        return _where(np.arange(columns) < drawn[:, None], first, self.config.fill_token_id)

    def step_logprobs(self, step: int) -> TokenLogprobs | None:
        """Those (b,) of one step's tokens, from 1 on."""
        column = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, step - 1, 1, keepdims=False), self.decoded.logprobs)
        found, drawn = jax.device_get((column, self.decoded.state.rows.drawn))
        return _where(drawn == step, found, self.config.fill_token_id)


def _where(own: np.ndarray, found: TokenLogprobs | None, fill: int) -> TokenLogprobs | None:
    """Log-probabilities where `own`, bool (…), is true, elsewhere 0 of the token that rows are filled with."""
    if found is None or found.top is None:
        return found and TokenLogprobs(np.where(own, found.chosen, np.float32(0)))
    wide = own[..., None]
    top, tokens = np.where(wide, found.top, np.float32(0)), np.where(wide, found.top_tokens, np.int32(fill))
    return TokenLogprobs(np.where(own, found.chosen, np.float32(0)), top, tokens)


def _start(
    model: SmolVLMForConditionalGeneration,
    params,
    input_ids=None,
    attention_mask=None,
    pixel_values=None,
    pixel_attention_mask=None,
    *,
    inputs_embeds=None,
    num_tiles=None,
    image_hidden_states=None,
    generation_config: GenerationConfig | None = None,
    seed: int | Sequence[int] = 0,
    mesh: Mesh | None = None,
    kv_cache_dtype: str | None = None,
    report: Callable[..., None] | None = None,
    **overrides,
) -> _Run:
    """Check the arguments of `generate` and `stream` on the host, pad them to buckets, run the prefill."""
    quantized = check_kv_cache_dtype(kv_cache_dtype)
    check_model(model, params, mesh)
    require_text(model)
    config = call_config(model, generation_config, overrides)
    prompts = prompt_arrays(
        model,
        config,
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        pixel_values=pixel_values,
        pixel_attention_mask=pixel_attention_mask,
        num_tiles=num_tiles,
        image_hidden_states=image_hidden_states,
        seed=seed,
        pad_tiles=mesh is not None,
    )
    warn_of_room(model, config, overrides, prompts)
    config, inputs, settings = prompts.config, prompts.inputs, prompts.settings
    tiles = len(inputs.get("pixel_values", ())) if mesh is None else 0
    work = _Work(report, len(set(_encoder_sizes(model.config, tiles))))
    if mesh is not None:
        put = lambda x: jax.device_put(x, batch_sharding(mesh, np.shape(x)))
        inputs, settings = {name: put(x) for name, x in inputs.items()}, jax.tree.map(put, settings)
    elif "pixel_values" in inputs:
        inputs = _encoded(model, params, inputs, work)
    tile = 64 if jax.default_backend() == "cpu" else 128  # a TPU's tiles have 128 columns, which the decode kernel wants whole
    cache_length = -(-(prompts.length + (config.max_new_tokens or 0)) // tile) * tile
    text = model.config.text_config
    stored = CacheFormat.choose(text, cache_length, model.dtype, quantized=quantized, mesh=mesh)
    scored = config.return_dict_in_generate and (config.output_scores or config.output_logits)
    work.compiles("prefill")
    with activate(mesh):
        decoded, first = _prefill(model, Rules.of(config), cache_length, params, inputs, settings, stored, scored=scored)
    work.computes("reading the prompt", until=decoded.state.rows)
    work.compiles("decoding")
    return _Run(model, params, config, mesh, prompts.input_ids, decoded, first)


def _takes_prompts(
    start: Callable[_Arguments, _Run],
) -> Callable[[Callable[[_Run], _Out]], Callable[_Arguments, _Out]]:
    """Give a function of a `_Run` the signature of `start`, which makes the run of the arguments."""

    def decorate(function: Callable[[_Run], _Out]) -> Callable[_Arguments, _Out]:
        @functools.wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Out:
            if len(args) + ("model" in kwargs) + ("params" in kwargs) < 2:
                name = function.__name__
                raise InputError(
                    f"{name} needs a model and its parameters: model, params = load(source), or what from_pretrained gave; "
                    f"{name}(model, params, **inputs) with inputs = processor.encode_chat(messages)"
                )
            check_call(function.__name__, inspect.signature(start).parameters, args, kwargs)
            try:
                return function(start(*args, **kwargs))
            except OTHER_PARAMETERS as error:
                raise misfit(error) from error

        returns = inspect.signature(function).return_annotation
        call.__signature__ = inspect.signature(start).replace(return_annotation=returns)  # type: ignore[attr-defined]
        return call

    return decorate


@_takes_prompts(_start)
def generate(run: _Run) -> Any:
    """Continue prompts until every row has drawn a stop token, max_new_tokens are drawn, or the model's positions are used up.

    Rows do not influence each other.

    Args:
        model: as `load` returns it.
        params: of the model.
        input_ids: int (b, t), padded on either side.
        attention_mask: (b, t), 1 = real. Default: pad tokens are padding.
        inputs_embeds: (b, t, d), read in place of input_ids. With these alone the result has new tokens only.
        pixel_values, pixel_attention_mask, num_tiles, image_hidden_states: as in the model's forward. A processor's output can
            be passed as it is: `generate(model, params, **inputs, max_new_tokens=64)`.
        generation_config: how to continue; also one of transformers. Default: what the checkpoint says.
        seed: an int, or one for each row.
        mesh: where `params` were placed.
        kv_cache_dtype: "int8" stores keys and values in 8 bits. Default: as the model computes.
        report: called with what is being done, in words, and where there are several of these with two numbers: which one it
            is, and how many there are. Such as "compiling", 3, 5.
        **overrides: fields of `GenerationConfig` that differ from `generation_config`; None switches one off. Arguments of
            transformers' generate that do not exist here are taken with values that ask for nothing, such as num_beams=1.

    Returns:
        int32 (b, t + new): each row's prompt as given, then its new tokens; rows that stop early are filled with the pad
        token. With num_return_sequences=n there are n rows for each prompt, one after the other. With
        return_dict_in_generate=True or logprobs=k the return type is GenerateOutput, whose `sequences` is this array.

    Raises:
        InputError: for settings out of range, pictures and image tokens that disagree in number, and prompts that leave none of
            the model's positions.
    """
    if not run.config.return_dict_in_generate and run.config.logprobs is None:
        run.decode(run.steps)
        return run.sequences()
    found = []
    if run.first is None:
        run.decode(run.steps)
    else:
        found = run.decode_scored()
    return GenerateOutput(
        sequences=run.sequences(),
        scores=tuple(entry.scores for entry in found) if run.config.output_scores else None,
        logits=tuple(entry.logits for entry in found) if run.config.output_logits else None,
        past_key_values=run.decoded.state.cache,
        logprobs=run.logprobs(),
    )


@_takes_prompts(_start)
def stream(run: _Run) -> Iterator[Any]:
    """Yield the tokens that `generate` would return, as soon as they are drawn.

    Ends after the step in which the last row stops. Mistakes are raised by the call itself, not by the first step.

    Args:
        model: as in `generate`, like all others.
        params: of the model.
        input_ids: int (b, t).
        attention_mask: (b, t).
        inputs_embeds: (b, t, d).
        pixel_values, pixel_attention_mask, num_tiles, image_hidden_states: the pictures.
        generation_config: how to continue.
        seed: an int, or one for each row.
        mesh: where `params` were placed.
        kv_cache_dtype: "int8", or None.
        report: called with what is being done.
        **overrides: fields of `GenerationConfig`, without return_dict_in_generate.

    Yields:
        int32 (b,) for each step; rows that have stopped have the pad token. With logprobs a pair, the tokens and their
        `TokenLogprobs` (b,).

    Raises:
        InputError: as `generate` raises it, and for return_dict_in_generate.
    """
    if run.config.return_dict_in_generate:
        raise InputError("stream yields tokens alone: return_dict_in_generate is for generate")
    return _tokens(run)


def _tokens(run: _Run) -> Iterator[Any]:
    for step in range(1, run.steps + 1):
        if step > 1:
            run.decode(step)
        rows = run.decoded.state.rows
        token, drawn, finished = jax.device_get((rows.token, rows.drawn, rows.finished))
        tokens = np.where(drawn == step, token, np.int32(run.config.fill_token_id))
        yield tokens if run.config.logprobs is None else (tokens, run.step_logprobs(step))
        if finished.all():
            return
