"""`--on`: from "v5e:2x4", "h100:8" or "here" to devices, which need not exist, and the chip they are."""

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, MissingExtraError
from .chips import CHIPS, SLICES, Chip, find_chip

__all__ = ["Target", "chip_here", "parse_target"]

_GPUS_OF_A_HOST = 8


@dataclass(frozen=True)
class Target:
    """Chips to compile for.

    Attributes:
        chip: None for the devices of this process, whose chip `chip_here` finds.
        shape: of a TPU slice, such as (2, 4); of GPUs (n,). Empty for the devices of this process.
    """

    chip: Chip | None
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many chips."""
        return math.prod(self.shape)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the process that compiles, to be set before jax is imported."""
        if not self.shape:
            return {}
        return {
            "JAX_PLATFORMS": "cpu",
            # The compiler for TPUs looks for no chips, and lets other processes use theirs.
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # autotuning would run kernels
        }

    def devices(self) -> Sequence[Any]:
        """The devices, for compilation alone unless they are this process's own.

        Raises:
            MissingExtraError: the chip's compiler is not installed.
            InputError: the compiler knows no such slice.
        """
        import jax
        from jax.experimental import topologies

        if not self.shape or self.chip is None:
            return jax.devices()
        if self.chip.platform == "cuda":
            return self._gpus(topologies, self.chip)
        name = "x".join(map(str, self.shape))
        whole = f"{self.chip.name}:{name if self.count >= _size(self.chip.smallest) else self.chip.smallest}"
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=whole).devices
        except Exception as error:
            if not importlib.util.find_spec("libtpu"):
                raise MissingExtraError("the TPU compiler", "plan") from error
            first_line = str(error).partition("\n")[0]
            raise InputError(f"the TPU compiler knows no slice {whole}: {first_line[:200]}") from error
        return found if self.count >= _size(self.chip.smallest) else found[: self.count]

    def _gpus(self, topologies: Any, chip: Chip) -> Sequence[Any]:
        hosts = -(-self.count // _GPUS_OF_A_HOST)
        each = min(self.count, _GPUS_OF_A_HOST)
        try:
            return topologies.get_topology_desc(
                "", platform="cuda", topology=f"1x{hosts}x{each}", target_config=_card_text(chip)
            ).devices
        except Exception as error:
            text = str(error)
            if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
                raise MissingExtraError("the compiler for NVIDIA's GPUs", "plan-cuda") from error
            raise InputError(f"the CUDA compiler knows no {self.count} × {chip.name}: {text[:200]}") from error


def parse_target(text: str) -> Target:
    """A target from its name.

    Args:
        text: "v5e:2x4" (a TPU slice, which is "v5e-8" or "v5litepod-8" too), "v5e" or "v5e:1x1" (one chip), "h100", "h100:8",
            or "here".

    Raises:
        InputError: there is no such chip, or what follows its name is no number or shape of chips.
    """
    if text.lower() == "here":
        return Target(None, ())
    name, colon, size = _written_out(text).partition(":")
    if name == "here":
        raise InputError(f"--on {text}: here is all devices of this machine, without a number; or name chips, such as v5e:2x2")
    chip = find_chip(name)
    if not colon:
        return Target(chip, (1,))
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){0,2}", size) or (chip.platform == "cuda" and "x" in size):
        example = f"{name}:8" if chip.platform == "cuda" else f"{name}:{chip.smallest}"
        raise InputError(f"--on {text}: {size!r} is no number of chips; write {example}, say")
    shape = tuple(int(n) for n in size.split("x"))
    if chip.platform == "tpu" and not _is_slice(chip, shape):
        example = SLICES.get(name, {}).get(math.prod(shape), "") if chip.smallest.count("x") == 1 else ""
        raise InputError(f"--on {text}: {size} is no slice of {name}; write {name}:{example or chip.smallest}, say")
    return Target(chip, shape)


def _is_slice(chip: Chip, shape: tuple[int, ...]) -> bool:
    """Whether there may be a slice of this shape; what passes is left to the TPU compiler.

    A shape has at most one dimension more than the smallest slice. Fewer chips than that slice has must divide it, and only for
    these is one number a shape.
    """
    whole, count = _size(chip.smallest), math.prod(shape)
    return len(shape) <= chip.smallest.count("x") + 1 and (len(shape) > 1 if count >= whole else whole % count == 0)


def _written_out(text: str) -> str:
    """A target in lower case, of which an accelerator type of Google Cloud ("v5litepod-8") is written as its slice."""
    name, dash, number = text.lower().replace("v5litepod", "v5e").partition("-")
    if not dash or name not in CHIPS:
        return name + dash + number
    known = SLICES.get(name, {})
    if number.isdecimal() and int(number) in known:
        return f"{name}:{known[int(number)]}"
    example = f"{name}:8" if CHIPS[name].platform == "cuda" else f"{name}:{CHIPS[name].smallest}"
    numbers = f"those of {name} are {', '.join(f'{name}-{n}' for n in known)}; " if known else ""
    raise InputError(f"--on {text}: no slice of this name; {numbers}write {example}, say")


def chip_here() -> Chip | None:
    """The chip of this process's devices, if it is in the table."""
    import jax

    kind = jax.devices()[0].device_kind.lower()
    # In this order: "tpu v5" is a v5p, and part of the others.
    names = {"v5 lite": "v5e", "v5e": "v5e", "v6 lite": "v6e", "v6e": "v6e", "tpu7x": "tpu7x", "tpu v5": "v5p"}
    names |= {chip.name: chip.name for chip in CHIPS.values() if chip.platform == "cuda"}
    return next((CHIPS[name] for part, name in names.items() if part in kind), None)


def _size(shape: str) -> int:
    return math.prod(int(n) for n in shape.split("x"))


def _card_text(chip: Chip) -> str:
    """A GPU as the compiler wants it described, a GpuTargetConfigProto as text."""
    card = chip.card
    assert card is not None
    (major, minor), (shared, largest) = card.capability, card.shared_memory
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {card.threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {largest}
  core_count: {card.cores} fpus_per_core: {card.float_units} clock_rate_ghz: {card.clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {chip.bandwidth:.0f} device_memory_size: {chip.memory} l2_cache_size: {card.l2_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{card.name}"
"""
