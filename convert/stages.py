"""Run two checkpoints over the same inputs and compare every stage: tokens, pixels, each layer, logits, greedy tokens.

Every run is in float32. The models of all runs get the inputs of the first one, so that a difference shows in the stage that
causes it, and not because the tokenizers differ. transformers runs too where it is installed and can read the directory; then
it is the reference.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..config import SmolVLMConfig
from ..errors import InputError
from .opened import Checkpoint

__all__ = [
    "NEW_TOKENS",
    "TOLERANCE",
    "Inputs",
    "StageReport",
    "StageRow",
    "builtin_picture",
    "check_comparable",
    "compare_stages",
]

NEW_TOKENS = 12
# Largest difference of a stage, over the largest value of the reference there: "float32" between checkpoints of one dtype, else
# that of the coarser of the two; "int8" are weights in 8 bits.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "int8": 2e-1}
QUESTION = "Can you describe this image?"
STATEMENT = "Name three colours."

Stages = dict[tuple[str, str], np.ndarray]  # (prompt, stage) -> values

POSITION_RULES = {
    "intended": "the intended rule: bucket(i) = floor(i·P/n), the identity on a full tile, as transformers 5.23 has it",
    "transformers-4.56": "the rule of transformers 4.56 and 4.57: in float32 patches 0 and 1 of an axis share a position, "
    "and the last one is never used",
}


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run.

    Attributes:
        ids: of each prompt, int64 (1, t).
        pixels: of the picture's tiles, float32 (tiles, 3, T, T).
    """

    ids: dict[str, np.ndarray]
    pixels: np.ndarray


@dataclass(frozen=True)
class StageRow:
    """One stage of one prompt.

    Attributes:
        prompt, stage: its names.
        shape: of the values in the reference run.
        scale: their largest finite magnitude.
        relative: run -> largest difference from the reference run over `scale`, for tokens the share that differs; None if the
            run has no such stage.
        differing: the runs beyond the tolerance.
    """

    prompt: str
    stage: str
    shape: tuple[int, ...]
    scale: float
    relative: dict[str, float | None]
    differing: tuple[str, ...]


@dataclass
class StageReport:
    """The outcome of `compare_stages`.

    Attributes:
        runs: their names, the reference first.
        rows: one for each stage.
        tolerances: by run, without the reference.
        position_rule: the rule for the encoder's position ids, in words.
        notes: what else a reader should know.
    """

    runs: list[str]
    rows: list[StageRow]
    tolerances: dict[str, float]
    position_rule: str
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return not any(row.differing for row in self.rows)

    def first_parting(self, run: str) -> StageRow | None:
        """The first stage at which a run exceeds the tolerance."""
        return next((row for row in self.rows if run in row.differing), None)

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        return {"reference": self.runs[0], "position_ids": facts.pop("position_rule"), "same": self.same, **facts}


def builtin_picture(height: int = 240, width: int = 320) -> np.ndarray:
    """A picture made by a formula, uint8 (height, width, 3), smooth in each channel."""
    y, x = np.mgrid[:height, :width]
    channels = (x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x * 3 + y * 5) % 256)
    return np.stack(channels, axis=-1).astype(np.uint8)


def formula_inputs(config: SmolVLMConfig) -> Inputs:
    """Inputs for a checkpoint without tokenizer and processor files: ids and one tile, made from the config."""
    vocabulary, image = config.text_config.vocab_size, config.image_token_id
    words = [i for i in range(3, min(vocabulary, 4000)) if i != image][::7][:9]
    ids = {"picture": [*words[:4], *[image] * config.image_seq_len, *words[4:]], "text": words}
    side = config.vision_config.image_size
    values = (builtin_picture(side, side).astype(np.float64) * (1 / 255)).astype(np.float32)
    pixels = np.einsum("hwc->chw", (values - np.float32(0.5)) / np.float32(0.5))[None]
    return Inputs({name: np.asarray([row], np.int64) for name, row in ids.items()}, np.ascontiguousarray(pixels))


def has_processor(source: Checkpoint) -> bool:
    names = source.companions
    tokenizer = "tokenizer.json" in names or ("vocab.json" in names and "merges.txt" in names)
    return tokenizer and ("preprocessor_config.json" in names or "processor_config.json" in names)


def our_inputs(directory: Path) -> tuple[Inputs, dict[str, str]]:
    """The built-in prompts and picture through our processor, and the prompts with their markers expanded."""
    from PIL import Image

    from ..processing.processor import SmolVLMProcessor

    processor = SmolVLMProcessor.from_pretrained(str(directory))
    marker = processor.image_token
    close, picture = f"{processor.end_of_utterance_token}\nAssistant:", Image.fromarray(builtin_picture())
    prompts = {
        "picture": f"<|im_start|>User:{marker}{QUESTION}{close}",
        "text": f"<|im_start|>User: {STATEMENT}{close}",
    }
    seen = processor(
        images=[[picture]], text=[prompts["picture"]], images_kwargs={"do_image_splitting": False}, return_tensors="np"
    )
    plain = processor(text=[prompts["text"]], return_tensors="np")
    expanded = {**prompts, "picture": prompts["picture"].replace(marker, processor.media_tokens.picture(0, 0))}
    pixels = np.asarray(seen["pixel_values"], np.float32)[0]
    return Inputs({"picture": seen["input_ids"], "text": plain["input_ids"]}, pixels), expanded


def reference_inputs(directory: Path, prompts: dict[str, str]) -> Inputs:
    """The same from transformers' tokenizer and its image processor for Pillow, which needs no torchvision."""
    import transformers
    from PIL import Image

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = {
        name: np.asarray([tokenizer(text, add_special_tokens=False)["input_ids"]], np.int64) for name, text in prompts.items()
    }
    images = transformers.SmolVLMImageProcessorPil.from_pretrained(directory)
    seen = images([[Image.fromarray(builtin_picture())]], do_image_splitting=False, return_tensors="np")
    return Inputs(ids, np.asarray(seen["pixel_values"], np.float32)[0])


@functools.lru_cache(maxsize=4)
def _compiled(model: Any) -> tuple[Callable, Callable]:
    """The encoder with the connector, and the decoder, of one model: compiled once for both checkpoints."""
    import jax

    def see(parts, tiles):
        seen = parts.model.vision_model(tiles)
        return seen.hidden_states, seen.last_hidden_state, parts.model.connector(seen.last_hidden_state)

    @jax.jit
    def encode(params, tiles):
        return model.apply({"params": params}, tiles, method=see)

    @jax.jit
    def decode(params, ids, features):
        out = model.apply({"params": params}, ids, image_hidden_states=features, output_hidden_states=True)
        return out.hidden_states, out.logits

    return encode, decode


def run_ours(source: Checkpoint, inputs: Inputs, position_ids: str) -> Stages:
    """What our model makes of the inputs, in float32."""
    import jax.numpy as jnp

    from ..model import SmolVLMForConditionalGeneration
    from .place import place

    model = SmolVLMForConditionalGeneration(source.model_config, dtype=jnp.float32, vision_position_ids=position_ids)
    params = place(source, model, jnp.float32)
    encode, decode = _compiled(model)
    states, last, features = encode(params, jnp.einsum("ichw->ihwc", jnp.asarray(inputs.pixels)))
    out = _vision_stages(states, last, features)
    for prompt, ids in inputs.ids.items():
        given = features if prompt == "picture" else None
        length = ids.shape[1]
        # The decoder is causal, so what follows the last token has no effect: one shape, one compilation.
        row = np.concatenate([ids, np.zeros((1, NEW_TOKENS), ids.dtype)], axis=1)
        states, logits = decode(params, jnp.asarray(row), given)
        out.update(_text_stages(prompt, [np.asarray(state)[:, :length] for state in states], np.asarray(logits)[:, :length]))
        for number in range(length, length + NEW_TOKENS):
            row[0, number] = int(jnp.argmax(logits[0, number - 1]))
            _, logits = decode(params, jnp.asarray(row), given)
        out[prompt, "greedy tokens"] = row[:, length:]
    return out


def run_transformers(directory: Path, inputs: Inputs) -> Stages:
    """The same by transformers, in float32 and with its plain attention."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        pixels = torch.from_numpy(inputs.pixels)
        seen = model.model.vision_model(pixel_values=pixels, output_hidden_states=True)
        features = model.model.connector(seen.last_hidden_state)
        out = _vision_stages(seen.hidden_states, seen.last_hidden_state, features)
        for prompt, ids in inputs.ids.items():
            tokens = torch.from_numpy(np.asarray(ids, np.int64))
            given = {"pixel_values": pixels[None]} if prompt == "picture" else {}
            answer = model(input_ids=tokens, output_hidden_states=True, use_cache=True, **given)
            out.update(_text_stages(prompt, answer.hidden_states, answer.logits))
            greedy = []
            for _ in range(NEW_TOKENS):
                greedy.append(int(answer.logits[0, -1].argmax()))
                answer = model(input_ids=torch.tensor([greedy[-1:]]), past_key_values=answer.past_key_values, use_cache=True)
            out[prompt, "greedy tokens"] = np.asarray([greedy])
    return out


def _states(prompt: str, kind: str, states: Sequence[Any]) -> Stages:
    """The embeddings, then each layer."""
    names = ["embeddings", *(f"layer {number}" for number in range(1, len(states)))]
    return {(prompt, f"{kind} {name}"): np.asarray(state) for name, state in zip(names, states, strict=True)}


def _vision_stages(states: Sequence[Any], last: Any, features: Any) -> Stages:
    ends = {("picture", "vision output"): np.asarray(last), ("picture", "image tokens"): np.asarray(features)}
    return {**_states("picture", "vision", states), **ends}


def _text_stages(prompt: str, states: Sequence[Any], logits: Any) -> Stages:
    ends = {(prompt, "text output"): np.asarray(states[-1]), (prompt, "logits"): np.asarray(logits)}
    return {**_states(prompt, "text", states[:-1]), **ends}


def _tokens_and_pixels(inputs: Inputs) -> Stages:
    return {**{(prompt, "tokens"): ids for prompt, ids in inputs.ids.items()}, ("picture", "pixels"): inputs.pixels}


def _distance(reference: np.ndarray, found: np.ndarray) -> float:
    if reference.shape != found.shape:
        return float("inf")
    if np.issubdtype(reference.dtype, np.integer):
        return float((reference != found).mean())
    same = (reference == found) | (
        np.isnan(reference) & np.isnan(found)
    )  # what is infinite or NaN in both alike is no difference
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(found.astype(np.float64) - reference))
    largest = float(gap.max()) / (_largest(reference) or 1.0)
    return float("inf") if np.isnan(largest) else largest


def _largest(values: np.ndarray) -> float:
    """The largest magnitude of those that are finite."""
    wide = np.abs(values.astype(np.float64))
    return float(np.max(wide, where=np.isfinite(wide), initial=0.0))


def check_comparable(a: Checkpoint, b: Checkpoint, differences: Sequence[str]) -> None:
    """Raise InputError unless the stages of two checkpoints can be compared; `differences`: of their settings, in words."""
    if a.model_config.replace(model_type=b.model_config.model_type) != b.model_config:
        where = next((line for line in differences if line.startswith("config ") and "model_type" not in line), "config.json")
        raise InputError(
            f"NOT the same: {a.name} (A) and {b.name} (B) describe different models ({where}): no stages can be compared; "
            "leave out --stages (stages=True) to compare their tensors"
        )
    if a.model_config.embedding_dim is not None:
        raise InputError("the stages of a retrieval model are not compared: it makes no text")


def compare_stages(
    a: Checkpoint, b: Checkpoint, *, position_ids: str = "intended", notify: Callable[[str], None]
) -> StageReport:
    """Run what can run, and compare every stage with the first run.

    Args:
        a, b: two checkpoints of one model, as `check_comparable` says.
        position_ids: the rule for the encoder's position ids in our runs.
        notify: called with a line before each run.

    """
    notes: list[str] = []
    runs: dict[str, Stages] = {}
    sides = {"A": a, "B": b}
    reference_ready = all(importlib.util.find_spec(name) is not None for name in ("transformers", "torch"))
    if not reference_ready:
        notes.append("transformers and torch are not installed: only our own model was run")
    own = {side: our_inputs(source.root) for side, source in sides.items() if has_processor(source)}
    if not own:
        notes.append("no tokenizer and processor files: ids and pixels were made from the config")
    shared = next(iter(own.values()))[0] if own else formula_inputs(a.model_config)
    for side, source in sides.items():
        if reference_ready and source.kind == "hf" and source.path == source.root and source.layout == "full":
            name = f"{side} transformers"
            notify(f"running {name}")
            inputs = reference_inputs(source.path, own[side][1]) if side in own else shared
            runs[name] = {**_tokens_and_pixels(inputs), **run_transformers(source.path, shared)}
    for side, source in sides.items():
        name = f"{side} ours"
        notify(f"running {name}")
        inputs = own[side][0] if side in own else shared
        runs[name] = {**_tokens_and_pixels(inputs), **run_ours(source, shared, position_ids)}
    rule = f"ours follows {POSITION_RULES[position_ids]}"
    if any(name.endswith("transformers") for name in runs):
        rule += f"; transformers {version('transformers')} is installed and follows its own"
    dtypes = {name: "int8" if sides[name[0]].quantized else sides[name[0]].dtype.name for name in runs}
    rows, tolerances = _rows(runs, dtypes)
    first, stages = next(iter(runs.items()))
    if broken := sum(not np.isfinite(values).all() for values in stages.values()):
        notes.append(f"{broken} stages of {first} have values that are NaN or infinite; runs that have the same there agree")
    return StageReport(runs=list(runs), rows=rows, tolerances=tolerances, position_rule=rule, notes=notes)


def _tolerance(reference: str, dtype: str) -> float:
    """Everything is computed in float32: only weights that have been rounded justify more than its tolerance."""
    return TOLERANCE["float32"] if reference == dtype else max(TOLERANCE[reference], TOLERANCE[dtype])


def _rows(runs: dict[str, Stages], dtypes: dict[str, str]) -> tuple[list[StageRow], dict[str, float]]:
    """The rows, by prompt, and the tolerance of every run but the first, which is the reference."""
    reference, *others = runs
    tolerances = {name: _tolerance(dtypes[reference], dtypes[name]) for name in others}
    rows = []
    for (prompt, stage), values in sorted(runs[reference].items(), key=lambda item: item[0][0]):
        found = {name: runs[name].get((prompt, stage)) for name in others}
        relative = {name: None if other is None else _distance(values, other) for name, other in found.items()}
        differing = []
        for name, gap in relative.items():
            # rounded weights may choose another token where two are nearly as likely, which is no failure
            exact = stage in ("tokens", "greedy tokens")
            judged = not (stage == "greedy tokens" and dtypes[name] != dtypes[reference])
            if judged and gap is not None and gap > (0 if exact else tolerances[name]):
                differing.append(name)
        rows.append(StageRow(prompt, stage, values.shape, _largest(values), relative, tuple(differing)))
    return rows, tolerances
