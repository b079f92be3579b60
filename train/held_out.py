"""The loss on held-out conversations: packed, by the same code as the training loss."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..model import SmolVLMForConditionalGeneration
from ..sharding import activate, replicated
from .config import DataConfig
from .forward import token_losses
from .packing import BatchShape, make_batch, plan_rows
from .partition import Partition
from .processes import everyones
from .progress import Display
from .records import Records
from .samples import Prepare, Sample, Skipped
from .state import TrainState
from .step import place

__all__ = ["HeldOutLoss"]


class HeldOutLoss:
    """Mean cross-entropy over the learned tokens of held-out records, and the share of them that the model ranks first.

    Records are prepared anew each time, a window of rows at a time: what they hold is not kept in memory. The processes of a
    job divide them. A record that training would skip is left out.

    Args:
        model: of the training.
        partition: what is trained.
        base: the frozen parameters, under LoRA.
        records: the held-out ones.
        count: how many of them are used, the first.
        data: how they become rows.
        prepare: makes samples of them.
        shape: of a process's part of a batch.
        mesh: of the training.

    Attributes:
        count: how many records are used.
        told: why records were left out, the last time.
    """

    def __init__(
        self,
        model: SmolVLMForConditionalGeneration,
        partition: Partition,
        *,
        base: dict,
        records: Records,
        count: int,
        data: DataConfig,
        prepare: Prepare,
        shape: BatchShape,
        mesh: Mesh,
    ):
        self._base, self._mesh, self._shape, self._data = base, mesh, shape, data
        self._records, self.count, self._prepare = records, min(count, len(records)), prepare
        config = partition.config

        def sums(params, base, batch):
            tree = partition.combine(base, params)
            return token_losses(model, tree, batch, tile_chunk=config.tile_chunk, loss_chunk=config.loss_chunk)

        self._sums = jax.jit(sums, out_shardings=replicated(mesh))
        self.told: list[str] = []

    def __call__(self, state: TrainState, display: Display, stopped: Callable[[], bool]) -> dict[str, Any] | None:
        """The figures of a state: held_out_loss, held_out_accuracy, held_out_loss_s (seconds), and held_out_skipped where
        records were left out.

        Args:
            state: the state.
            display: shows how far it is.
            stopped: whether to give up.

        Returns:
            None if it gave up, or nothing could be used.
        """
        started, self._seen = time.perf_counter(), 0
        self._skipped: list[str] = []
        totals = []
        batches = self._batches()
        while any(everyones((batch := next(batches, None)) is not None)):
            if stopped():
                return None
            display.doing(f"held-out loss, {self._seen:,} of {len(range(*self._own())):,} records")
            rows = self._empty() if batch is None else batch
            with activate(self._mesh):
                totals.append(self._sums(state.params, self._base, place(rows, self._mesh)))
        display.doing("")
        losses, counts, hits = (np.sum([float(total[part]) for total in totals]) for part in range(3))
        skipped = sum(everyones(len(self._skipped)))
        self.told = self._skipped
        figures = {"held_out_skipped": skipped} if skipped else {}
        if not counts:
            return figures
        figures |= {"held_out_loss": losses / counts, "held_out_accuracy": hits / counts}
        return figures | {"held_out_loss_s": time.perf_counter() - started}

    def _own(self) -> tuple[int, int, int]:
        return jax.process_index(), self.count, jax.process_count()

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Batches of this process's records."""
        pad = self._prepare.processor.tokenizer.pad_token_id
        waiting: list[list[Sample]] = []
        for rows in self._rows():
            waiting.append(rows)
            if len(waiting) == self._shape.rows:
                yield make_batch(waiting, self._shape, pad)
                waiting = []
        if waiting:
            yield make_batch([*waiting, *[[]] * (self._shape.rows - len(waiting))], self._shape, pad)

    def _rows(self) -> Iterator[list[Sample]]:
        window: list[Sample] = []
        tokens, want = 0, self._data.window_rows * self._data.length if self._data.packing else 1
        for index in range(*self._own()):
            item = self._prepare(self._records[index])
            self._seen += 1
            if isinstance(item, Skipped):
                self._skipped.append(f"{item.reason}: {item.detail}")
                continue
            window.append(item)
            tokens += len(item)
            if tokens >= want:
                yield from self._planned(window)
                window, tokens = [], 0
        yield from self._planned(window)

    def _planned(self, samples: list[Sample]) -> list[list[Sample]]:
        plan = plan_rows(samples, self._shape, alone=not self._data.packing)
        return [[samples[number] for number in row] for row in plan]

    def _empty(self) -> dict[str, np.ndarray]:
        return make_batch([[]] * self._shape.rows, self._shape, self._prepare.processor.tokenizer.pad_token_id)
