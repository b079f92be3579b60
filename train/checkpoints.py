"""Checkpoints of a run: written while it continues, the newest few and the best kept, restored on any number of devices."""

from pathlib import Path

import jax

from ..errors import CheckpointError
from .state import TrainState

__all__ = ["Checkpoints"]


class Checkpoints:
    """directory/checkpoints/STEP: the state (parameters, moments, counters) and the data position.

    A context manager: leaving it waits for what is being written. If a process is killed while writing one, the one before it
    stays the newest.

    Args:
        directory: of the run.
        keep: how many of the newest are kept.
        better: the metric by which the best one is kept as well.
    """

    def __init__(self, directory: Path, keep: int, better: str = "exact_match"):
        import orbax.checkpoint as ocp

        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=lambda metrics: metrics[better], n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            save_decision_policy=policies.FixedIntervalPolicy(1),  # the loop decides
            cleanup_tmp_directories=True,  # what a killed process was writing
        )
        self._ocp, self._better = ocp, better
        self.directory = Path(directory).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, positions: list, metrics: dict[str, float] | None = None) -> None:
        """Start writing; returns when the state has been copied.

        Args:
            step: of the state. A step that has a checkpoint already is not written again.
            state: the state.
            positions: the data position of every process.
            metrics: figures of the evaluation at this step.
        """
        if step in self._manager.all_steps():
            return
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state), data=self._ocp.args.JsonSave({"positions": positions})
        )
        metrics = metrics if metrics and self._better in metrics else None
        self._manager.save(step, args=args, metrics=metrics, force=True)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, list]:
        """Read the checkpoint of a step.

        Args:
            step: of the checkpoint.
            like: the state to expect, as ShapeDtypeStructs with the shardings to restore to; the number of devices may differ
                from that of the run that saved it.

        Returns:
            The state, and the data position of every process.

        Raises:
            CheckpointError: it belongs to another model or optimiser.
        """
        args = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(like), data=self._ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} under {self.directory} belongs to another model or optimiser: continue with "
                f"the configuration it was made with, or start in another directory ({str(error).splitlines()[0]})"
            ) from error
        return restored.state, restored.data["positions"]

    def preempted(self, step: int) -> bool:
        """In a job of several processes: whether one of them was told to stop, agreed on by all of them."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)
