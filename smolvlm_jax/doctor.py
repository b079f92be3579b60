"""`smolvlm-jax doctor`: what is installed, what the machine has, what is missing and the command that brings it.

Importing this module imports nothing heavy. The devices are asked for in a process of their own: a TPU that another process
holds may keep the caller waiting.
"""

import argparse
import glob
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from . import __version__
from .arguments import add_command
from .compilation_cache import cache_directory, check_cache
from .errors import SmolVLMError
from .locate import bundled_models
from .storage import StorePath
from .terminal import show, table

__all__ = ["Report", "add_parser", "examine"]

_PATIENCE = 120  # seconds
_DISTRIBUTION = "smolvlm-jax"
_SHOWN = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "tokenizers", "pillow", "av", "decord")
# The extras for development and testing are not reported: users do not need them.
_OURS = ("dev", "test", "test-without-torch", "docs")
_ASK = """
import json, jax
print(json.dumps([[d.platform, d.device_kind, (d.memory_stats() or {}).get("bytes_limit")] for d in jax.local_devices()]))
"""
_HARDWARE = {
    "a TPU": (("/dev/accel*", "/dev/vfio/[0-9]*"), "tpu", "pip install -U 'jax[tpu]'"),
    "an NVIDIA GPU": (("/dev/nvidia[0-9]*",), "gpu", "pip install -U 'jax[cuda12]'"),
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `doctor` found.

    Attributes:
        machine: in words: Python, system, cores, memory in bytes, free disk space.
        versions: of packages; None: not installed.
        devices: platform, kind and bytes of memory (None: not known) of each device that jax sees.
        cache: the directory of compiled programs and the bytes in it.
        extras: what each optional extra lacks; empty: nothing.
        problems: what will not work, each with what to do.
    """

    machine: dict[str, str]
    versions: dict[str, str | None]
    devices: list[tuple[str, str, int | None]]
    cache: tuple[str, int]
    extras: dict[str, list[str]]
    problems: list[str] = field(default_factory=list)

    def to_text(self) -> str:
        """For people: sections of two columns, problems last."""
        devices: dict[str, int] = {}
        for kind, name, memory in self.devices:
            words = f"{name} ({kind})" + (f", {memory / 2**30:.1f} GiB" if memory else "")
            devices[words] = devices.get(words, 0) + 1
        sections = {
            f"smolvlm-jax {__version__}": list(self.machine.items()),
            "packages": [(name, version or "not installed") for name, version in self.versions.items()],
            "devices": [(f"{count} ×", words) for words, count in devices.items()] or [("none", "")],
            "compiled programs": [(self.cache[0], f"{self.cache[1] / 1e6:,.1f} MB")],
            "bundled checkpoints": [(name, "") for name in bundled_models()],
            "extras": [
                (name, f"lacks {', '.join(lacking)}: pip install '{_DISTRIBUTION}[{name}]'" if lacking else "installed")
                for name, lacking in self.extras.items()
            ],
            "problems": [(problem, "") for problem in self.problems] or [("none", "")],
        }
        indented = ("\n".join(f"  {line}" for line in table(rows).splitlines()) for rows in sections.values())
        return "\n".join(f"{title}\n{text}" for title, text in zip(sections, indented, strict=True))


def examine() -> Report:
    """Look at this machine and installation. Takes some seconds, which jax takes to start."""
    problems: list[str] = []
    free = shutil.disk_usage(Path.home()).free
    machine = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.machine()}, {_cores()} cores",
        "memory": _memory(),
        "free disk": f"{free / 1e9:,.1f} GB in {Path.home()}",
    }
    if free < 2e9:
        problems.append(f"{free / 1e9:.1f} GB are free in {Path.home()}: compiled programs and downloads need some GB")
    versions = {name: _version(name) for name in _SHOWN}
    if versions["av"] is None and versions["decord"] is None:
        problems.append("no library reads videos: pip install 'av>=18'")
    devices = _devices(problems)
    _unused_hardware(devices, problems)
    cache = _cache(problems)
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        problems.append("HF_HUB_OFFLINE is set: models of the Hub are read from the local cache alone; unset HF_HUB_OFFLINE")
    return Report(machine=machine, versions=versions, devices=devices, cache=cache, extras=_extras(problems), problems=problems)


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> str:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
        return f"{kilobytes['MemTotal'] / 2**20:.1f} GiB, {kilobytes['MemAvailable'] / 2**20:.1f} GiB of it available"
    except (OSError, KeyError, ValueError, IndexError):
        return "not known"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices(problems: list[str]) -> list[tuple[str, str, int | None]]:
    """What jax sees."""
    try:
        done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        problems.append(f"jax has found no devices within {_PATIENCE} s: another process may hold the TPU; end it")
        return []
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        problems.append(f"jax cannot start: {last[:300]}; JAX_PLATFORMS=cpu does without an accelerator")
        return []
    return [tuple(device) for device in json.loads(done.stdout.splitlines()[-1])]


def _unused_hardware(devices: list[tuple[str, str, int | None]], problems: list[str]) -> None:
    """Accelerators of the machine that jax does not use."""
    seen, chosen = {device[0] for device in devices}, os.environ.get("JAX_PLATFORMS")
    for name, (patterns, kind, command) in _HARDWARE.items():
        if kind not in seen and any(glob.glob(pattern) for pattern in patterns):
            why = f"unset JAX_PLATFORMS, which is {chosen}" if chosen and kind not in chosen.split(",") else command
            problems.append(f"there is {name}, and jax does not use it: {why}")


def _cache(problems: list[str]) -> tuple[str, int]:
    """The directory of compiled programs, and its size."""
    place = cache_directory()
    if place is None:
        problems.append("there is no home directory, so programs are compiled at every start: set XDG_CACHE_HOME")
        return "none", 0
    if isinstance(place, StorePath):
        try:
            check_cache()
        except SmolVLMError as error:
            problems.append(str(error))
        return str(place), 0
    nearest = next(parent for parent in (place, *place.parents) if parent.exists())
    if not os.access(nearest, os.W_OK):
        problems.append(f"{place} cannot be written, so programs are compiled at every start: set XDG_CACHE_HOME")
    return str(place), sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


def _extras(problems: list[str]) -> dict[str, list[str]]:
    """What the extras of this package lack, each as pip names it, by what the installation says of itself."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        problems.append("extras cannot be checked without packaging: pip install packaging")
        return {}
    found = importlib.metadata.metadata(_DISTRIBUTION)
    requirements = [Requirement(text) for text in importlib.metadata.requires(_DISTRIBUTION) or ()]
    for requirement in requirements:
        if "extra" not in str(requirement.marker or "") and _applies(requirement, "") and (lack := _lack(requirement)):
            problems.append(f"{lack.what}: pip install '{requirement.name}{requirement.specifier}'")
    names = [name for name in found.get_all("Provides-Extra") or () if name not in _OURS]
    of = lambda name: [r for r in requirements if "extra" in str(r.marker or "") and _applies(r, name)]
    return {name: [lack.package for r in of(name) if (lack := _lack(r))] for name in names}


def _applies(requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


class _Lack(NamedTuple):
    package: str
    what: str


def _lack(requirement) -> _Lack | None:
    """What is wrong with a requirement, and which package pip is to bring; None if nothing is."""
    name = requirement.name
    version = _version(name)
    if version is None:
        return _Lack(name, f"{name} is not installed")
    if not requirement.specifier.contains(version, prereleases=True):
        return _Lack(f"{name}{requirement.specifier}", f"{name} is {version}, and {requirement.specifier} is needed")
    # `jax[tpu]` is no package: what it stands for is asked for too.
    for extra in requirement.extras:
        inner = {"tpu": "libtpu", "cuda12": "jax-cuda12-plugin"}.get(extra)
        if inner is not None and _version(inner) is None:
            return _Lack(inner, f"{inner} is not installed")
    return None


def _run(options: argparse.Namespace) -> int:
    found = examine()
    show(json.dumps(asdict(found), indent=2) if options.json else found.to_text())
    return 1 if found.problems else 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    command = add_command(
        commands,
        "doctor",
        _run,
        help="say what is installed and what is missing",
        description="Say what is installed, which devices jax sees, what is missing and the command that brings it. "
        "Exit code 0: nothing is wrong.",
        examples=("smolvlm-jax doctor", "smolvlm-jax doctor --json"),
    )
    command.add_argument("--json", action="store_true", help="print JSON")
