"""The chips that programs are compiled for, and what their makers say they can do. Imports no jax.

Sources: cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x: memory, bandwidth and peaks of a chip), the data sheets of NVIDIA's
A100 80GB SXM, H100 SXM, L4 and HGX B200 (peaks without sparsity), and openxla/xla's gpu/target_config/specs for what the CUDA
compiler is told of a card. Clocks of TPUs follow from peak and width of the matrix units; a chip whose clock is not known has
cycles, but no time from them.
"""

from dataclasses import dataclass

from ..errors import InputError, first_few

__all__ = ["CHIPS", "SLICES", "Card", "Chip", "find_chip"]

_GIB = 2**30
# jax takes this share of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
_GPU_SHARE = 0.75


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the CUDA compiler has to know of a GPU beside its memory and bandwidth.

    Attributes:
        name: as the driver reports it.
        capability: compute capability, major and minor.
        cores: streaming multiprocessors.
        clock_ghz: of them.
        float_units: float32 units of a core.
        threads: that a core holds.
        shared_memory: bytes of a core, and what one block may ask for.
        l2_bytes: of the cache that all cores share.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    float_units: int
    threads: int
    shared_memory: tuple[int, int]
    l2_bytes: int


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as jax counts them.

    Attributes:
        name: as `--on` has it.
        platform: "tpu" or "cuda".
        memory: bytes.
        usable: bytes that programs can have.
        flops: products and sums of bfloat16 a second, at most.
        int8_ops: the same of int8.
        bandwidth: bytes of its memory a second.
        clock: cycles a second of a TPU's core; None where it is not known.
        product_cycles: cycles for which one instruction holds a TPU's matrix unit.
        smallest: for a TPU, the smallest topology that the compiler knows; its first devices serve for fewer chips.
        card: for a GPU.
    """

    name: str
    platform: str
    memory: int
    usable: int
    flops: float
    int8_ops: float
    bandwidth: float
    clock: float | None = None
    product_cycles: int = 0
    smallest: str = ""
    card: Card | None = None


def _tpu(name: str, *, usable_gib: float, **facts) -> Chip:
    return Chip(name=name, platform="tpu", usable=int(usable_gib * _GIB), **facts)


def _gpu(name: str, *, memory: int, **facts) -> Chip:
    return Chip(name=name, platform="cuda", memory=memory, usable=int(_GPU_SHARE * memory), **facts)


# `usable` of TPUs is the limit that their compiler names when a program does not fit.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu(
            "v5e", memory=16 * _GIB, usable_gib=15.75, flops=197e12, int8_ops=394e12, bandwidth=819e9,
            clock=1.5e9, product_cycles=16, smallest="2x2",
        ),
        _tpu(
            "v5p", memory=95 * _GIB, usable_gib=95.74, flops=459e12, int8_ops=918e12, bandwidth=2765e9,
            clock=1.75e9, product_cycles=16, smallest="2x2x1",
        ),
        _tpu(
            "v6e", memory=32 * _GIB, usable_gib=31.25, flops=918e12, int8_ops=1836e12, bandwidth=1640e9,
            clock=1.75e9, product_cycles=8, smallest="2x2",
        ),
        _tpu(
            "tpu7x", memory=96 * _GIB, usable_gib=94.75, flops=1153e12, int8_ops=1153e12, bandwidth=3690e9, smallest="2x2x1",
        ),
        _gpu(
            "a100", memory=85100068864, flops=312e12, int8_ops=624e12, bandwidth=2039e9,
            card=Card(
                name="NVIDIA A100-SXM4-80GB", capability=(8, 0), cores=108, clock_ghz=1.41, float_units=64, threads=2048,
                shared_memory=(167936, 166912), l2_bytes=41943040,
            ),
        ),
        _gpu(
            "h100", memory=84942979072, flops=989e12, int8_ops=1979e12, bandwidth=3352e9,
            card=Card(
                name="NVIDIA H100 80GB HBM3", capability=(9, 0), cores=132, clock_ghz=1.98, float_units=128, threads=2048,
                shared_memory=(233472, 232448), l2_bytes=52428800,
            ),
        ),
        _gpu(
            "l4", memory=23580639232, flops=121e12, int8_ops=242e12, bandwidth=300e9,
            card=Card(
                name="NVIDIA L4", capability=(8, 9), cores=58, clock_ghz=2.04, float_units=128, threads=1536,
                shared_memory=(102400, 101376), l2_bytes=50331648,
            ),
        ),
        _gpu(
            "b200", memory=191514411008, flops=2250e12, int8_ops=4500e12, bandwidth=7672e9,
            card=Card(
                name="NVIDIA B200", capability=(10, 0), cores=148, clock_ghz=1.965, float_units=128, threads=2048,
                shared_memory=(233472, 232448), l2_bytes=132644864,
            ),
        ),
    )
}  # fmt: skip


# Slices by the numbers in Google Cloud's accelerator types: v5litepod-8, v6e-8. Those of v5p count cores, two a chip.
_FLAT = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
SLICES: dict[str, dict[int, str]] = {
    "v5e": _FLAT,
    "v6e": _FLAT,
    "v5p": {
        8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8",
        2048: "8x8x16", 4096: "8x16x16", 8192: "16x16x16",
    },
}  # fmt: skip


def find_chip(name: str) -> Chip:
    """A chip of the table.

    Raises:
        InputError: there is none of this name.
    """
    if name not in CHIPS:
        raise InputError(f"no chip {name!r:.40}; known are {', '.join(first_few(CHIPS, 20))}, and here for this machine's own")
    return CHIPS[name]
