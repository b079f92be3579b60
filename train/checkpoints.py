"""Checkpoints of a run: written while it continues, the newest few and the best kept, restored on any number of devices."""

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from ..convert.file_sums import damaged_files, write_sums
from ..convert.orbax_errors import reason, tell_once
from ..directories import disk_full
from ..errors import CheckpointError, SmolVLMError, StorageError
from ..storage import AnyPath
from .mirror import Mirror
from .processes import everyones
from .state import TrainState
from .steps import rename_aside, set_aside

__all__ = ["Checkpoints"]

_LOSS = "held_out_loss"


class Checkpoints:
    """directory/checkpoints/STEP: the state (parameters, moments, counters) and the data position.

    A context manager: leaving it waits for what is being written. If a process is killed while writing one, the one before it
    stays the newest. A checkpoint carries checksums of its files; when a run is opened, those that are damaged are set aside.

    Args:
        directory: of the run.
        keep: how many of the newest are kept.
        better: the metric by which the best one is kept as well; where it is not measured, the lowest held_out_loss counts.
        mirror: where in a store the directory is sent to whenever a checkpoint is complete.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole, or none can be kept there.
    """

    def __init__(self, directory: Path, keep: int, better: str = "exact_match", mirror: Mirror | None = None):
        import orbax.checkpoint as ocp

        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=self._figure, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=self._figure,  # without it orbax does not write the metrics down
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            save_decision_policy=policies.FixedIntervalPolicy(1),  # the loop decides
            cleanup_tmp_directories=True,  # what a killed process was writing
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._ocp, self._better = ocp, better
        self.directory = Path(directory).absolute() / "checkpoints"
        self._mirror, self._sending = mirror, ThreadPoolExecutor(1)
        self._sent: Future | None = None
        self._shown: AnyPath = self.directory if mirror is None else mirror.path / "checkpoints"
        if jax.process_index() == 0:
            set_aside(self.directory, self._shown)
        everyones(None)  # the others wait for the first
        tell_once()
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError:
            raise
        except Exception as error:  # what orbax raises where it does not understand what it finds
            raise CheckpointError(f"{self._shown} cannot be opened: {reason(error)}") from error

    def _figure(self, metrics: Any) -> float:
        """By which the best is kept; whatever stands in its place is the worst."""
        found = [(1.0, metrics.get(self._better)), (-1.0, metrics.get(_LOSS))] if isinstance(metrics, Mapping) else []
        return next(
            (sign * float(value) for sign, value in found if isinstance(value, (int, float)) and value == value), -math.inf
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with self._writing(), self._sending:
            try:
                self._wait_until_sent()
            finally:
                self._manager.close()
            if self._mirror is not None:
                self._mirror.send()

    def _wait_until_sent(self) -> None:
        sent, self._sent = self._sent, None
        if sent is not None:
            sent.result()

    def _send(self, mirror: Mirror) -> None:
        """In a thread: wait until a checkpoint is complete, and send it."""
        self._manager.wait_until_finished()
        mirror.send()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What goes wrong in writing, also before the block in orbax's threads, is one error."""
        try:
            yield
        except SmolVLMError:
            raise
        except (OSError, ValueError) as error:
            why = "the disk is full" if disk_full(error) else reason(error)
            raise StorageError(
                f"a checkpoint under {self._shown} cannot be written: {why}. Those before it are whole, and the run goes "
                "on from there when it is started again"
            ) from error

    def _seal(self) -> None:
        """Orbax calls this when all files of a step are written, and renames the step's directory afterwards."""
        if jax.process_index() == 0:
            for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
                if (step := path.name.partition(".")[0]).isdecimal():
                    write_sums(path, int(step))

    def save(self, step: int, state: TrainState, positions: list, metrics: dict[str, float] | None = None) -> None:
        """Start writing; returns when the state has been copied.

        Args:
            step: of the state. A step that has a checkpoint already is not written again.
            state: the state.
            positions: the data position of every process.
            metrics: figures of the evaluation at this step.

        Raises:
            StorageError: this one cannot be written, or the one before it, whose writing went on meanwhile. Leaving the context
                raises it too.
        """
        if step in self._manager.all_steps():
            return
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state), data=self._ocp.args.JsonSave({"positions": positions})
        )
        with self._writing():
            self._wait_until_sent()
            self._manager.save(step, args=args, metrics=dict(metrics or {}), force=True)
        if self._mirror is not None:
            self._sent = self._sending.submit(self._send, self._mirror)

    def restore(self, like: TrainState, check: Callable[[Any], None] = lambda position: None) -> tuple[TrainState, list] | None:
        """Read the newest checkpoint; the one before it, if what this one holds cannot be what was saved.

        Args:
            like: the state to expect, as ShapeDtypeStructs with the shardings to restore to; the number of devices may differ
                from that of the run that saved it.
            check: raises CheckpointError for a data position that is none.

        Returns:
            The state, and the data position of every process; None if there is no checkpoint.

        Raises:
            CheckpointError: they belong to another model or optimiser.
        """
        args = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(like), data=self._ocp.args.JsonRestore())
        faults: dict[str, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._manager.restore(step, args=args)
                found = restored.state, _positions(restored, step, check)
            except CheckpointError as error:
                faults[str(step)] = str(error)
                continue  # in all processes alike
            except Exception as error:  # of damaged files orbax, tensorstore and jax raise whatever it leads to
                # Several processes restore together: one of them alone cannot go on to another step.
                if damaged_files(self.directory / str(step), 0) is not None or jax.process_count() > 1:
                    raise CheckpointError(
                        f"the checkpoint of step {step} under {self._shown} belongs to another model or optimiser: continue "
                        f"with the configuration it was made with, or start in another directory ({reason(error)})"
                    ) from error
                faults[str(step)] = reason(error)
                continue
            if jax.process_index() == 0:
                rename_aside(self.directory, faults, step, self._shown)
            everyones(None)
            self._manager.reload()
            return found
        if not faults:
            return None
        newest, fault = next(iter(faults.items()))
        raise CheckpointError(
            f"no checkpoint under {self._shown} can be restored (step {newest}: {fault}): they are damaged, or belong to "
            "another model or optimiser"
        )

    def preempted(self, step: int) -> bool:
        """In a job of several processes: whether one of them was told to stop, agreed on by all of them."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)


def _positions(restored: Any, step: int, check: Callable[[Any], None]) -> list:
    """The data positions that were restored with a state. Raises CheckpointError if they are not the step's."""
    if int(restored.state.step) != step:
        raise CheckpointError(f"it is the state of step {int(restored.state.step)}")
    positions = restored.data.get("positions") if isinstance(restored.data, Mapping) else None
    if not isinstance(positions, list) or not positions:
        raise CheckpointError("it has no data position")
    for position in positions:
        check(position)
    return positions
