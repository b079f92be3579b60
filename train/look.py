"""What a run says before its first step: what is trained, on what, and what will not fit."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from ..errors import SmolVLMError
from ..parameters import flatten_params
from ..processing import SmolVLMProcessor
from ..processing.chat import collect_media, has_video, normalize_conversations
from ..processing.fetch import is_url
from ..processing.pdf_pages import with_pages
from .config import DataConfig, TrainConfig
from .partition import Partition, part_of
from .records import Records, messages_of
from .samples import fitted

__all__ = ["described", "room_warning"]

_LOOKED_AT = 20


def described(partition: Partition, mesh: Mesh, records: Sequence[int]) -> list[str]:
    """Lines that name the model, its parameters and those that are trained, the data and the length of the run.

    Args:
        partition: what is trained.
        mesh: where.
        records: how many there are in each source.
    """
    config = partition.config
    sizes = {path: leaf.size for path, leaf in flatten_params(partition.split(partition.params)[0]).items()}
    trained = sum(sizes.values())
    adapters = sum(size for path, size in sizes.items() if part_of(path) == "lora")
    whole = sum(leaf.size for tree in (partition.params, partition.base) for leaf in flatten_params(tree).values()) - adapters
    parts: dict[str, int] = {}
    for path, size in sizes.items():
        parts[part_of(path)] = parts.get(part_of(path), 0) + size
    names = {"lora": f"adapters of rank {config.lora.rank}" if config.lora else ""}
    words = ", ".join(f"{names.get(part, part)} {_count(size)}" for part, size in parts.items())
    origin = f"{config.model}{f' with {config.adapter}' if config.adapter else ''}"
    start = ", from random weights" if config.weights == "random" else ""
    rows = config.accumulation * config.data.batch_size
    kind = mesh.devices.flat[0].device_kind
    return [
        f"model {origin}, {_count(whole)} parameters{start}; trained are {_count(trained)} ({trained / whole:.1%}): {words}",
        f"{sum(records):,} records from {_sources(config)}; {config.steps:,} steps of {rows:,} rows of {config.data.length:,} "
        f"tokens on {mesh.size} device{'s' * (mesh.size > 1)} ({kind}"
        + (f", {jax.process_count()} processes" if jax.process_count() > 1 else "")
        + f"); output {config.output}",
    ]


def room_warning(sources: Sequence[Records], processor: SmolVLMProcessor, config: DataConfig) -> str | None:
    """What of the first records has no room in a row, from the headers of their pictures; None if all of it fits.

    Records with videos or pictures behind URLs are passed over: they are not opened before they are needed.
    """
    long, seen, picture = [], 0, ""
    for records in sources:
        for index in range(min(_LOOKED_AT, len(records))):
            try:
                messages = messages_of(records[index])
                messages = with_pages(messages, processor.image_processor.limits)
                normal = normalize_conversations(messages).messages
                pictures = collect_media(normal, "image")[0]
                if has_video(normal) or any(map(is_url, pictures)):
                    continue
                fitting, dropped, needed = fitted(processor, messages, config)
                seen += 1
                if fitting is None or dropped:
                    long.append(needed)
                    tiles = [processor.image_processor.plan_picture(picture).num_tiles for picture in pictures]
                    if tiles and not picture:
                        picture = (
                            f"; a picture there takes {max(tiles) * processor.image_seq_len:,} tokens in {max(tiles)} tiles"
                        )
            except (SmolVLMError, OSError):
                continue  # it is counted where it is read
    if not long:
        return None
    room = f"data.length {config.length:,}" + (
        "" if config.tiles_per_row is None else f", data.tiles_per_row {config.tiles_per_row}"
    )
    then = "lose pictures" if config.too_long == "drop_pictures" else "are skipped"
    fewer = ", or let pictures take fewer tiles (data.image_options={max_tiles: 5})" if picture else ""
    return (
        f"warning: {len(long)} of the first {seen} records do not fit a row ({room}), the first needs {long[0]}{picture}: such "
        f"records {then}. Raise the room of a row{fewer}"
    )


def _sources(config: TrainConfig) -> str:
    names = [source.path for source in config.data.train]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _count(number: int) -> str:
    return f"{number:,}" if number < 1e6 else f"{number / 1e6:,.1f} M" if number < 1e9 else f"{number / 1e9:.2f} B"
