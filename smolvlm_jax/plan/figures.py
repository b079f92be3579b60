"""What a plan says: `Cost` of a program, `Memory` of a chip, `Rate` of a workload, and the `Plan` that holds them. No jax."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import sizes_apart

__all__ = ["Collective", "Cost", "Memory", "Plan", "Rate", "excess"]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Collectives of one kind in a program: how many, and bytes on one chip."""

    count: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one compiled program needs of one chip. Of a decode program: for one step.

    Attributes:
        name: such as "prefill 2048".
        argument_bytes: of its arguments, as the compiler counts them, padding included.
        output_bytes: of its results.
        alias_bytes: of those results that are written in place of arguments.
        temporary_bytes: beside them, at the worst moment.
        code_bytes: of the program itself.
        input_bytes: of those arguments that exist for this call only: tiles, tokens.
        flops: of its matrix products, with attention counted whole.
        bytes: read from and written to memory, kernels included.
        kernel_bytes: of these, what Pallas's kernels say that they move.
        xla_cycles: by XLA's estimates; None where the compiler gives none.
        kernel_cycles: of Pallas's kernels, by their schedules.
        unknown_loops: loops in kernels whose steps are decided on the chip, each counted as one step.
        missing_kernels: kernels without a schedule, which count no cycles.
        kernels: how often each Pallas kernel runs.
        libraries: how often each other custom call runs, such as cuDNN's.
        launches: kernels that a GPU starts.
        collectives: by kind.
        seconds: that it took to compile.
        floor_seconds: the larger of flops over the chip's peak and bytes over its bandwidth; None for an unknown chip.
        estimated_seconds: the larger of cycles over the clock and bytes over the bandwidth; None without cycles.
    """

    name: str
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0
    temporary_bytes: int = 0
    code_bytes: int = 0
    input_bytes: int = 0
    flops: float = 0
    bytes: float = 0
    kernel_bytes: float = 0
    xla_cycles: float | None = None
    kernel_cycles: float | None = None
    unknown_loops: int = 0
    missing_kernels: tuple[str, ...] = ()
    kernels: dict[str, int] = field(default_factory=dict)
    libraries: dict[str, int] = field(default_factory=dict)
    launches: float = 0
    collectives: dict[str, Collective] = field(default_factory=dict)
    seconds: float = 0
    floor_seconds: float | None = None
    estimated_seconds: float | None = None

    @property
    def cycles(self) -> float | None:
        """Of a TPU's core, all together."""
        return None if self.xla_cycles is None else self.xla_cycles + (self.kernel_cycles or 0)

    @property
    def own_bytes(self) -> int:
        """What a call takes beside what is there anyway: inputs, temporaries, results that are new."""
        return self.input_bytes + self.temporary_bytes + self.output_bytes - self.alias_bytes


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one chip.

    Attributes:
        kinds: what is kept ("weights", "KV cache", "features", "optimizer"), what the largest program takes beside it
            ("temporaries", "inputs and results"), and "code" of all programs.
        largest: which program that is.
        usable: what the chip has for programs; None where that is unknown.
    """

    kinds: dict[str, int]
    largest: str
    usable: int | None

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self.kinds.values())


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Records a second on all chips together, between two bounds.

    Attributes:
        low: if every program takes what the compiler estimates; on GPUs, if it reaches the shares in `assumptions`; None for a
            chip whose clock is not known.
        high: if every program reaches the chip's peak or its bandwidth, whichever takes longer.
        shares: of the time at the lower rate, or at the only one, by kind of program.
        assumptions: in words.
    """

    low: float | None
    high: float
    shares: dict[str, float]
    assumptions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a model needs on chips.

    Attributes:
        model: its name.
        chip: the chip's name.
        chips: how many.
        mesh: sizes of its axes.
        mode: "infer" or "train".
        shapes: what the programs are compiled for, such as slots and ring_lengths.
        memory: of one chip.
        programs: of one chip.
        rate: of a workload; None for a chip that is not known.
        step_seconds: (low, high) of a training step; None where it is not known.
        seconds: that all compilations took.
    """

    model: str
    chip: str
    chips: int
    mesh: dict[str, int]
    mode: str
    shapes: dict[str, Any]
    memory: Memory
    programs: tuple[Cost, ...]
    rate: Rate | None = None
    step_seconds: tuple[float, float] | None = None
    seconds: float = 0

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON.

        Returns:
            A dictionary of plain values.
        """
        found = asdict(self)
        found["memory"]["total"] = self.memory.total
        for program, cost in zip(found["programs"], self.programs, strict=True):
            program["cycles"] = cost.cycles
        return found


def excess(needed: int | None, usable: int | None) -> str:
    """By how much something does not fit a chip, in words.

    Args:
        needed: bytes; None, or no more than `usable`, where the compiler has not said how many.
        usable: that the chip has for programs; None where that is unknown.
    """
    if usable is None:
        return "it needs more than a chip has for programs"
    if needed is None or needed <= usable:
        return f"it needs more than the {usable / 1e9:.2f} GB that a chip has for programs"
    needs, has, over = sizes_apart(needed, usable)
    return f"it needs {needs} of a chip that has {has} for programs: {over} too much"
