"""What a run says before its first step: what is trained, on what, and what will not fit."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from ..errors import ConfigError, SmolVLMError, describe
from ..parameters import flatten_params
from ..processing import SmolVLMProcessor
from ..processing.bounds import least_tokens
from ..processing.chat import collect_media, has_video, normalize_conversations
from ..processing.fetch import is_url
from ..processing.pdf_pages import with_pages
from ..quantization import SCALE
from .config import DataConfig, TrainConfig
from .partition import Partition, part_of
from .records import Records, messages_of
from .samples import fitted

__all__ = ["described", "first_warnings"]

_LOOKED_AT = 20  # of each source
_MOST_LOOKED_AT = 1000


def described(partition: Partition, mesh: Mesh, records: Sequence[int]) -> list[str]:
    """Lines that name the model, its parameters and those that are trained, the data and the length of the run.

    Args:
        partition: what is trained.
        mesh: where.
        records: how many there are in each source.
    """
    config = partition.config
    sizes = {path: leaf.size for path, leaf in _parameters(partition.split(partition.params)[0]).items()}
    trained = sum(sizes.values())
    adapters = sum(size for path, size in sizes.items() if part_of(path) == "lora")
    whole = sum(leaf.size for tree in (partition.params, partition.base) for leaf in _parameters(tree).values()) - adapters
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
        f"{_number(sum(records), 'record')} from {_sources(config)}; {_number(config.steps, 'step')} of {_number(rows, 'row')} "
        f"of {config.data.length:,} tokens on {mesh.size} device{'s' * (mesh.size > 1)} ({kind}"
        + (f", {jax.process_count()} processes" if jax.process_count() > 1 else "")
        + f"); output {config.output}",
    ]


def first_warnings(sources: Sequence[Records], processor: SmolVLMProcessor, config: DataConfig) -> list[str]:
    """What of the first records is faulty or has no room in a row, from the headers of their pictures.

    Records with videos or pictures behind URLs are passed over: they are not opened before they are needed. Where none of the
    first can be used, further ones are looked at.

    Raises:
        ConfigError: none of the records can be used.
    """
    long: list[str] = []
    faulty: list[str] = []
    seen, usable, picture = 0, False, ""
    for records in sources:
        for index in range(min(_MOST_LOOKED_AT, len(records))):
            if usable and index >= _LOOKED_AT:
                break
            seen += 1
            element = records[index]
            try:
                messages = with_pages(messages_of(element), processor.image_processor.limits)
                normal = normalize_conversations(messages).messages
                pictures = collect_media(normal, "image")[0]
                if has_video(normal) or any(map(is_url, pictures)):
                    usable = True
                    continue
                fitting, dropped, needed = fitted(processor, messages, config)
                usable |= fitting is not None
                if fitting is None or dropped:
                    long.append(f"{element[-1]}: {needed}")
                    picture = picture or _largest(processor, messages, pictures, config)
            except (SmolVLMError, OSError) as error:
                faulty.append(f"{element[-1]}: {describe(error)}")
    room = f"data.length {config.length:,}" + (
        "" if config.tiles_per_row is None else f", data.tiles_per_row {config.tiles_per_row}"
    )
    fewer = ", or let pictures take fewer tiles (data.image_options={max_tiles: 5})" if picture else ""
    raised = f"Raise the room of a row{fewer}"
    if not usable and seen == sum(map(len, sources)):
        parts = [f"{len(faulty):,} faulty, the first {faulty[0]}"] if faulty else []
        if long:
            parts.append(f"{len(long):,} too long for a row ({room}), the first {long[0]}{picture}. {raised}")
        raise ConfigError(f"none of the {seen:,} records makes a sample: {'; '.join(parts)}")
    warnings = []
    if faulty:
        warnings.append(
            f"warning: {len(faulty):,} of the first {seen:,} records are faulty, the first {faulty[0]}: such "
            "records are skipped"
        )
    if long:
        then = "lose pictures" if config.too_long == "drop_pictures" else "are skipped"
        warnings.append(
            f"warning: {len(long):,} of the first {seen:,} records do not fit a row ({room}), the first {long[0]}{picture}: "
            f"such records {then}. {raised}"
        )
    return warnings


def _largest(processor: SmolVLMProcessor, messages: list, pictures: Sequence, config: DataConfig) -> str:
    """What the largest picture of a record takes, in words; "" where the record has no room with a tile a picture either."""
    if not pictures or least_tokens(processor, messages) > config.length:  # the text may be too long to count its tokens
        return ""
    tiles = [processor.image_processor.plan_picture(picture).num_tiles for picture in pictures]
    needed = processor.count_prompt_tokens(messages, special_tokens_in_text=config.special_tokens_in_text)[0]
    if needed - (sum(tiles) - len(tiles)) * processor.image_seq_len > config.length:
        return ""
    return f"; a picture there takes {max(tiles) * processor.image_seq_len:,} tokens in {max(tiles)} tiles"


def _sources(config: TrainConfig) -> str:
    names = [source.path for source in config.data.train]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _parameters(tree: dict) -> dict:
    """Path -> leaf, without the scales of matrices in 8 bits, which are no parameters of the model."""
    return {path: leaf for path, leaf in flatten_params(tree).items() if not path.endswith(SCALE)}


def _number(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _count(number: int) -> str:
    return f"{number:,}" if number < 1e6 else f"{number / 1e6:,.1f} M" if number < 1e9 else f"{number / 1e9:.2f} B"
