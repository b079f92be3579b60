"""Checkpoints of a run: written while it continues, the newest few and the best kept, restored on any number of devices."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from ..convert.file_sums import damaged_files, write_sums
from ..directories import disk_full
from ..errors import CheckpointError, StorageError
from .processes import everyones
from .state import TrainState
from .steps import rename_aside, set_aside

__all__ = ["Checkpoints"]


def _repeated(record: logging.LogRecord) -> bool:
    """A filter of log records: without those of orbax's threads, whose errors it raises again where they are waited for."""
    return "_SignalingThread" not in str(record.msg)


class Checkpoints:
    """directory/checkpoints/STEP: the state (parameters, moments, counters) and the data position.

    A context manager: leaving it waits for what is being written. If a process is killed while writing one, the one before it
    stays the newest. A checkpoint carries checksums of its files; when a run is opened, those that are damaged are set aside.

    Args:
        directory: of the run.
        keep: how many of the newest are kept.
        better: the metric by which the best one is kept as well.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """

    def __init__(self, directory: Path, keep: int, better: str = "exact_match"):
        import orbax.checkpoint as ocp

        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=lambda metrics: metrics[better], n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            save_decision_policy=policies.FixedIntervalPolicy(1),  # the loop decides
            cleanup_tmp_directories=True,  # what a killed process was writing
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._ocp, self._better = ocp, better
        self.directory = Path(directory).absolute() / "checkpoints"
        if jax.process_index() == 0:
            set_aside(self.directory)
        everyones(None)  # the others wait for the first
        logging.getLogger("absl").addFilter(_repeated)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            with self._writing():
                self._manager.close()
        finally:
            logging.getLogger("absl").removeFilter(_repeated)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What goes wrong in writing, also before the block in orbax's threads, is one error."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = "the disk is full" if disk_full(error) else str(error).splitlines()[0][:300]
            raise StorageError(
                f"a checkpoint under {self.directory} cannot be written: {reason}. Those before it are whole, and the run goes "
                "on from there when it is started again"
            ) from error

    def _seal(self) -> None:
        """Orbax calls this when all files of a step are written, and renames the step's directory afterwards."""
        if jax.process_index() == 0:
            for step in self.directory.glob("*.orbax-checkpoint-tmp*"):
                write_sums(step)

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
        metrics = metrics if metrics and self._better in metrics else None
        with self._writing():
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def restore(self, like: TrainState) -> tuple[TrainState, list] | None:
        """Read the newest checkpoint; if it cannot be read and has no checksums that prove it whole, the one before it.

        Args:
            like: the state to expect, as ShapeDtypeStructs with the shardings to restore to; the number of devices may differ
                from that of the run that saved it.

        Returns:
            The state, and the data position of every process; None if there is no checkpoint.

        Raises:
            CheckpointError: it belongs to another model or optimiser.
        """
        args = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(like), data=self._ocp.args.JsonRestore())
        faults: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._manager.restore(step, args=args)
                found = restored.state, restored.data["positions"]
            except Exception as error:  # of damaged files orbax, tensorstore and jax raise whatever it leads to
                faults[step] = (str(error).strip() or type(error).__name__).splitlines()[0]
                # Several processes restore together: one of them alone cannot go on to another step.
                if damaged_files(self.directory / str(step), 0) is None and jax.process_count() == 1:
                    continue
                break
            rename_aside(self.directory, faults, step)
            self._manager.reload()
            return found
        if not faults:
            return None
        newest = max(faults)
        raise CheckpointError(
            f"the checkpoint of step {newest} under {self.directory} belongs to another model or optimiser: continue with "
            f"the configuration it was made with, or start in another directory ({faults[newest]})"
        )

    def preempted(self, step: int) -> bool:
        """In a job of several processes: whether one of them was told to stop, agreed on by all of them."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)
