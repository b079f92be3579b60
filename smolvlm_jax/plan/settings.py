"""`PlanConfig`: what to compile, for which chips, and the work to estimate. Imports no jax."""

from dataclasses import dataclass, fields

from ..dtypes import name_fields
from ..errors import InputError
from ..field_types import check_types
from ..habits import named_arguments

__all__ = ["KINDS", "SHORT_NAMES", "PlanConfig", "Workload"]

# Kinds of the engine's programs, in the order in which a record goes through them.
KINDS = ("encode", "prefill", "insert", "decode")
SHORT_NAMES = {"256m": "SmolVLM-256M-Instruct", "500m": "SmolVLM-500M-Instruct", "2.2b": "SmolVLM2-2.2B-Instruct"}
# What has no meaning for a training step, and the switches of it.
_OF_THE_ENGINE = {
    "workload": "--tiles, --prompt and --new",
    "ring_lengths": "--ring-lengths",
    "slots": "--slots",
    "kv_cache_dtype": "--kv-cache",
    "live": "--live",
    "all_programs": "--all-programs",
    "kinds": "kinds",
    "layers": "layers",
}
# Switches that replace what a recipe says, and its keys.
_OF_BOTH = {"model": "model", "on": "topology", "mesh": "mesh", "dtype": "dtype", "attention": "attention"}


@named_arguments
@dataclass(frozen=True, kw_only=True)
class Workload:
    """What each record of a job is made of.

    Attributes:
        tiles: of its pictures, after splitting; 13 for a 4:3 picture and 17 for a square one with stock settings.
        prompt: tokens of the prompt, those of the tiles included.
        new: tokens of the answer.
    """

    tiles: int = 13
    prompt: int = 1100
    new: int = 700

    def __post_init__(self):
        check_types(self, InputError)
        for name, least in (("tiles", 0), ("prompt", 1), ("new", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} must be at least {least}, got {getattr(self, name)}")


@named_arguments
@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A question to the compilers.

    Attributes:
        model: 256m, 500m, 2.2b, the name of a published size, a directory, a bundled name or a Hub id. Default: the 256M; of a
            recipe, its own.
        on: chips, such as "v5e:2x4", "h100:8", or "here". Default: here; of a recipe, its topology.
        mesh: sizes like "data=4,tensor=2". Default: every chip is data parallel; of a recipe, as it says.
        mode: "infer" for the engine's programs, "train" for a recipe's step. Default: "train" where there is a recipe.
        recipe: of mode "train".
        overrides: `key=value` words that change the recipe.
        workload: of mode "infer".
        ring_lengths: as in `EngineConfig`. Default: the shortest of the engine's own that holds a record.
        slots: as in `EngineConfig`. Default: what the engine takes of the chip's memory.
        max_slots: search the largest number of slots that fits.
        all_programs: compile every program that the engine can need, not only those of the workload.
        kv_cache_dtype: as in `EngineConfig`.
        live: share of a ring's columns that rows see on average while they decode. For TPUs, whose kernel reads
            these alone; refused for other chips. Default: that of the workload's records.
        kinds: of the programs only these: "encode", "prefill", "insert", "decode". Then there is no rate.
        layers: compile only so many layers of (encoder, decoder), for a quick look.
        dtype: of weights and computation. Default: bfloat16; of a recipe, its own.
        quantize: "int8" for weights in 8 bits, of mode "infer". Default: as `model` is stored.
        attention: as in `load`; "auto" is, of a recipe, its own.
    """

    model: str | None = None
    on: str | None = None
    mesh: str | None = None
    mode: str | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    workload: Workload = Workload()
    ring_lengths: tuple[int, ...] | None = None
    slots: tuple[int, ...] | None = None
    max_slots: bool = False
    all_programs: bool = False
    kv_cache_dtype: str | None = None
    live: float | None = None
    kinds: tuple[str, ...] = KINDS
    layers: tuple[int, int] | None = None
    dtype: str | None = None
    quantize: str | None = None
    attention: str = "auto"

    def __post_init__(self):
        name_fields(self, "dtype")
        check_types(self, InputError)
        for name in ("model", "recipe", "mesh"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise InputError(f"--{name} is empty: leave it out, or say what it is")
        if self.mode not in (None, "infer", "train"):
            raise InputError(f"--mode {self.mode!r:.40} is neither infer nor train")
        if self.mode is not None and (self.mode == "train") != self.trains:
            raise InputError("--mode train needs --recipe, a YAML file or the name of a built-in recipe; --mode infer has none")
        if self.live is not None and not 0 < self.live <= 1:
            raise InputError(f"--live must be above 0 and at most 1, got {self.live}")
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise InputError(f"{unknown[0]!r:.40} is no kind of program; known are {', '.join(KINDS)}")
        if not self.kinds or (self.kinds == ("encode",) and not (self.workload.tiles or self.all_programs)):
            raise InputError(
                f"kinds is {self.kinds!r}, and records have {self.workload.tiles} tiles: nothing is left to compile"
            )
        if self.quantize not in (None, "int8"):
            raise InputError(f"--quantize {self.quantize!r:.40}: the choice is int8")
        if self.quantize and self.trains:
            raise InputError("--quantize is of the engine's weights; of a recipe with lora, frozen_dtype=int8 is the same")
        if self.overrides and self.recipe is None:
            raise InputError(f"{self.overrides[0]!r} changes a recipe, and there is none: add --recipe NAME")
        defaults = {field.name: field.default for field in fields(self)}
        if self.trains and (idle := [name for name in _OF_THE_ENGINE if getattr(self, name) != defaults[name]]):
            raise InputError(f"{_OF_THE_ENGINE[idle[0]]}: of the engine, while --recipe {self.recipe} is about a training step")
        for name, key in _OF_BOTH.items():
            same = [word for word in self.overrides if word.partition("=")[0].partition(".")[0] == key]
            if same and getattr(self, name) != defaults[name]:
                raise InputError(f"--{name} {getattr(self, name)} and {same[0]!r:.60} set the same: leave one out")
        if self.max_slots and (self.slots or self.trains):
            raise InputError("--max-slots searches the slots of an engine: leave out --slots, and --mode train")
        if self.max_slots and self.ring_lengths and len(self.ring_lengths) > 1:
            raise InputError("--max-slots searches the slots of one ring: give one of --ring-lengths")

    def visible_columns(self, slots: int, length: int) -> list[int]:
        """How many columns of a ring each of its rows sees: evenly spread between a record's prompt and its last token, or
        around the share `live`.

        Args:
            slots: rows of the ring.
            length: its columns.

        Returns:
            A number for each row.
        """
        low, high = self.workload.prompt, self.workload.prompt + self.workload.new
        if self.live is not None:
            low, high = round(max(2 * self.live - 1, 0) * length), round(min(2 * self.live, 1) * length)
        return [min(low + (2 * row + 1) * (high - low) // (2 * slots), length) for row in range(slots)]

    @property
    def trains(self) -> bool:
        """Whether this is about a recipe's step."""
        return self.recipe is not None

    @property
    def full_name(self) -> str:
        """The model's name, the short names of published sizes spelled out."""
        name = self.model or "256m"
        return SHORT_NAMES.get(name.lower(), name)
