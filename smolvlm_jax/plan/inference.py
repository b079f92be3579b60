"""What the engine needs on a chip: its programs compiled, its memory summed, its slots searched."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from ..attention.decode_limits import decode_pieces
from ..cache import ColumnBuffers
from ..encoder_kernels import INT8_CHIPS
from ..engine.compiled import Programs
from ..engine.settings import ANY_SLOTS, FREE_MEMORY_SHARE, RINGS, EngineConfig, EngineShapes
from ..errors import InputError
from ..model import SmolVLMForConditionalGeneration
from ..parameters import laid_out
from ..sharding import activate
from .figures import Cost, Memory, excess
from .flops import flops
from .measure import KernelLoops, Measurer, TooLarge, held_bytes
from .models import abstract_weights
from .settings import PlanConfig, Workload

__all__ = ["EngineOnChips", "prefill_bucket"]

# Which of a program's arguments are there anyway: weights, features, a ring. The others come with the call.
_KEPT = {"encode": 2, "prefill": 2, "insert": 1, "decode": 2}
# Programs that are compiled for a number of slots.
_OF_SLOTS = ("insert", "decode")
Notify = Callable[[str, int, int], None]


def _chosen_rings(config: PlanConfig, positions: int) -> tuple[int, ...]:
    """The lengths of the rings: those of the config, or the shortest of the engine's own that holds a record."""
    if config.ring_lengths is not None:
        return config.ring_lengths
    columns = config.workload.prompt + config.workload.new
    found = next((length for length in (*RINGS, positions) if columns <= length <= positions), None)
    if found is None:
        raise InputError(f"--prompt and --new together are {columns:,} tokens; the model has {positions:,} positions")
    return (found,)


@dataclass
class EngineOnChips:
    """The engine of a model on chips.

    Attributes:
        model: without weights.
        mesh: of the chips.
        measurer: compiles for them.
        config: what was asked.
        quantized: whether weights are in 8 bits.
        notify: told the name of each program before it is compiled, its number and how many there are.
    """

    model: SmolVLMForConditionalGeneration
    mesh: Mesh
    measurer: Measurer
    config: PlanConfig
    notify: Notify
    quantized: bool = False

    def __post_init__(self):
        chip = self.measurer.chip
        if self.config.live is not None and (chip is None or chip.platform != "tpu"):
            where = "this machine" if chip is None else chip.name
            raise InputError(
                f"--live {self.config.live}: a decode step on {where} reads all columns, seen or not; leave it out"
            )
        self.usable = self.measurer.chip.usable if self.measurer.chip else None
        self.weights = laid_out(abstract_weights(self.model, self.mesh, self.model.dtype, quantized=self.quantized))
        with activate(self.mesh):
            self.weight_bytes = held_bytes(self.weights)
        self.lanes = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self.rings = _chosen_rings(self.config, self.model.config.text_config.max_position_embeddings)
        self._costs: dict[tuple, Cost] = {}
        self._programs: dict[tuple, Programs] = {}
        self._held: dict[EngineShapes, dict[str, int]] = {}

    # ---- shapes

    def shapes(self, slots: tuple[int, ...] | None) -> EngineShapes:
        """The engine's shapes with so many slots, or with as many as it would take by itself."""
        free = None if self.usable is None else max(self.usable - self.weight_bytes, 0) * self.mesh.size
        chosen: Any = slots
        engine = EngineConfig(
            ring_lengths=self.rings,
            kv_cache_dtype=self.config.kv_cache_dtype,
            slots=chosen,
            cache_bytes=None if free is None or slots is not None else max(int(FREE_MEMORY_SHARE * free), 1),
        )
        return engine.resolve(self.model, self.mesh)

    def programs(self, shapes: EngineShapes, *, plain: bool = False) -> Programs:
        """The engine's programs; `plain` ones with no kernels of attention."""
        if (shapes, plain) not in self._programs:
            model = self.model.clone(attention="einsum") if plain else self.model
            self._programs[shapes, plain] = Programs(model, self.weights, shapes, self.mesh)
        return self._programs[shapes, plain]

    def ring_of_workload(self, shapes: EngineShapes) -> int:
        """The number of the ring that the workload's records go to.

        Raises:
            InputError: none of them is long enough.
        """
        work, lengths = self.config.workload, shapes.ring_lengths
        found = next((n for n, length in enumerate(lengths) if work.prompt + work.new <= length), None)
        if found is None:
            raise InputError(
                f"--prompt and --new together are {work.prompt + work.new:,} tokens; the longest ring has {lengths[-1]:,}"
            )
        return found

    def workload_keys(self, shapes: EngineShapes) -> list[tuple]:
        """The programs that the workload runs."""
        programs, work = self.programs(shapes), self.config.workload
        bucket, ring = prefill_bucket(programs, work), shapes.ring_lengths[self.ring_of_workload(shapes)]
        encode = [("encode", programs.encoder_batches()[0])] if work.tiles else []
        keys = [*encode, ("prefill", bucket), ("insert", programs.columns[bucket], ring), ("decode", ring, True)]
        return [key for key in keys if key[0] in self.config.kinds]

    def keys(self, shapes: EngineShapes) -> list[tuple]:
        """The programs to compile: those of the workload, or with `all_programs` every one, of the kinds that are asked for."""
        if not self.config.all_programs:
            return self.workload_keys(shapes)
        return [key for key in self.programs(shapes).keys() if key[0] in self.config.kinds]  # noqa: SIM118 (a method of ours)

    # ---- costs

    def costs(self, shapes: EngineShapes, keys: list[tuple]) -> list[Cost]:
        """Compile programs; what was compiled for the same shapes before is not compiled again."""
        places = {key: (key, shapes.slots if key[0] in _OF_SLOTS else None) for key in keys}
        new = [key for key in keys if places[key] not in self._costs]
        for number, key in enumerate(new, 1):
            self.notify(_name(key, shapes), number, len(new))
            self._costs[places[key]] = self._cost(shapes, key)
        return [self._costs[places[key]] for key in keys]

    def _cost(self, shapes: EngineShapes, key: tuple) -> Cost:
        kind, chip = key[0], self.measurer.chip
        with activate(self.mesh):
            inputs = self.programs(shapes).parts(*key)[1][_KEPT[kind] :]
            function, arguments, _ = self.programs(shapes, plain=True).parts(*key)
            return self.measurer.cost(
                _name(key, shapes),
                self.programs(shapes).lower(*key),
                flops=flops(function, *arguments) / self.mesh.size,
                input_bytes=held_bytes(inputs),
                steps=shapes.chunk if kind == "decode" else 1,
                loops=self._decode_loops(shapes, key[1]) if kind == "decode" else None,
                in_8_bits=kind == "encode" and self.quantized and chip is not None and chip.name in INT8_CHIPS,
            )

    def _decode_loops(self, shapes: EngineShapes, length: int) -> KernelLoops | None:
        """What the decode kernel does for rows that see so much of a ring, if it is the one that reads visible columns only."""
        slots = shapes.slots[shapes.ring_lengths.index(length)] // self.lanes
        buffers = self.programs(shapes).ring(length).cache.layers[0]
        if not isinstance(buffers, ColumnBuffers) or self.measurer.chip is None or self.measurer.chip.platform != "tpu":
            return None
        pieces = decode_pieces(length, buffers.pairs.shape[-1], buffers.size, buffers.pairs.dtype)
        if pieces is None:
            return None
        live = self.config.visible_columns(slots, length)
        items = sum(-(-columns // pieces.chunk) for columns in live)
        # The kernel states the bytes of a ring of which half is visible.
        return KernelLoops(-(-items // pieces.together), 2 * sum(live) / (slots * length))

    def workload_costs(self, shapes: EngineShapes) -> list[Cost]:
        """Of the programs that the workload runs."""
        return self.costs(shapes, self.workload_keys(shapes))

    def memory(self, shapes: EngineShapes, costs: list[Cost]) -> Memory:
        """Of one chip while it runs these programs."""
        largest = max(costs, key=lambda cost: cost.own_bytes)
        return Memory(
            kinds={
                **self._kept(shapes),
                "temporaries": largest.temporary_bytes,
                "inputs and results": largest.own_bytes - largest.temporary_bytes,
                "code": sum(cost.code_bytes for cost in costs),
            },
            largest=largest.name,
            usable=self.usable,
        )

    def _kept(self, shapes: EngineShapes) -> dict[str, int]:
        """What is there whatever program runs."""
        if shapes not in self._held:
            programs = self.programs(shapes)
            with activate(self.mesh):
                rings = sum(held_bytes(programs.ring(length)) for length in shapes.ring_lengths)
                features = held_bytes(programs.returns("pool"))
            self._held[shapes] = {"weights": self.weight_bytes, "KV cache": rings, "features": features}
        return self._held[shapes]

    # ---- the whole

    def measure(self) -> tuple[EngineShapes, list[Cost], Memory]:
        """Compile for the slots that are asked for, or search the largest number that fits.

        Raises:
            InputError: it does not fit; the message says by how much, and what to lower.
        """
        if self.config.max_slots:
            return self._search()
        shapes = self.shapes(self.config.slots)
        kept = sum(self._kept(shapes).values())
        if self.usable is not None and kept > self.usable:  # known without compiling for minutes
            raise InputError(self._too_large(shapes, kept))
        try:
            costs = self.costs(shapes, self.keys(shapes))
        except TooLarge as error:
            raise InputError(self._too_large(shapes, error.needed, error.usable)) from error
        memory = self.memory(shapes, costs)
        if self.usable is not None and memory.total > self.usable:
            raise InputError(self._too_large(shapes, memory.total))
        return shapes, costs, memory

    def _too_large(self, shapes: EngineShapes, needed: int | None, usable: int | None = None) -> str:
        """What does not fit, and what to lower. usable: what the compiler says, of a chip that is not in the table."""
        slots = ", ".join(f"{n:,} × {length:,}" for n, length in zip(shapes.slots, shapes.ring_lengths, strict=True))
        fewest = all(n == self.lanes for n in shapes.slots)
        lower = "lower --ring-lengths" if fewest else "lower --slots, or let --max-slots search"
        if self.usable is not None and self.weight_bytes > self.usable:
            lower = "divide the weights with --mesh over fsdp or tensor and more chips"
        return f"{self.config.full_name} with {slots} columns does not fit: {excess(needed, self.usable or usable)}; {lower}"

    def _try(self, slots: int) -> tuple[EngineShapes, list[Cost], Memory]:
        shapes = self.shapes((slots,))
        costs = self.costs(shapes, self.keys(shapes))
        return shapes, costs, self.memory(shapes, costs)

    def _search(self) -> tuple[EngineShapes, list[Cost], Memory]:
        """The largest number of slots that fits, in steps of one slot for each lane. Two sizes of the arrays tell all others,
        and programs that do not depend on the slots come first, so that few numbers of slots have to be compiled for."""
        if self.usable is None:
            raise InputError("--max-slots needs a chip whose memory is known: --on v5e, say")
        step = self.lanes
        one = self.shapes((step,))
        kept = sum(self._kept(one).values())
        if kept > self.usable:
            raise InputError(self._too_large(one, kept))
        each = sum(self._kept(self.shapes((2 * step,))).values()) - kept
        apart = self.costs(one, [key for key in self.keys(one) if key[0] not in _OF_SLOTS])
        needed = kept + sum(cost.code_bytes for cost in apart) + max((cost.own_bytes for cost in apart), default=0)
        low, high, fits, wanted = 0, ANY_SLOTS // step + 1, None, 1 + max(self.usable - needed, 0) // each
        while low < (wanted := min(wanted, high - 1)):
            over: int | None
            try:
                found = self._try(wanted * step)
                over = found[2].total - self.usable
            except TooLarge as error:
                over = None if error.needed is None or error.usable is None else max(error.needed - error.usable, 1)
            if over is not None and over <= 0:
                low, fits = wanted, found
                wanted += -over // each
            else:
                high = wanted
                # Where the compiler does not say by how much, the middle of what is left.
                wanted = (low + high) // 2 if over is None else max(wanted - -(-over // each), low + 1)
        if fits is None:
            raise InputError(self._too_large(one, max(needed, self.usable + (over or 0))))
        return fits


def prefill_bucket(programs: Programs, work: Workload) -> int:
    """The length of the packed rows that prompts of this length are put into when many wait: as many as fit, and no more room
    than they take."""
    tokens = max(programs.config.prefill_tokens // work.prompt, 1) * work.prompt
    fitting = [t for t in programs.buckets if t >= tokens]
    if not fitting:
        raise InputError(f"--prompt {work.prompt:,} is longer than the rings, {programs.config.ring_lengths}")
    return fitting[0]


def _name(key: tuple, shapes: EngineShapes) -> str:
    kind, *size = key
    if kind == "encode":
        return f"encode {size[0]} tiles"
    if kind == "prefill":
        return f"prefill {shapes.lanes} × {size[0]}"
    if kind == "insert":
        return f"insert {size[0]} into {size[1]}"
    slots = shapes.slots[shapes.ring_lengths.index(size[0])]
    return f"decode {slots} × {size[0]}" + ("" if size[1] else ", sampled")
