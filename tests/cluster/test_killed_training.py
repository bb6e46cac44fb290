"""The one training fault of ``make test``; ``make faults SUITE=training`` runs all of them."""

from training_runs import (
    TrainingRun,
    TrainingSetup,
    check_same_weights,
    kill_and_cut,
    kill_worker,
)


def test_killed_driver_cut_checkpoint_and_killed_worker_leave_no_trace(
    training_setup: TrainingSetup, trained: TrainingRun
) -> None:
    """The driver dies and its newest checkpoint is cut; then, as it continues, a worker dies."""
    training = training_setup.training("cut-worker", more="phases = [1]")
    kill_and_cut(training)
    job = training.start()
    job.says("phase 1 continues after epoch")
    kill_worker(training_setup)
    num_lines = len(job.lines)
    assert job.finish() == 0, job.output[-4000:]
    assert "a checkpoint is left out" in job.output, "the cut checkpoint was taken"
    later_output = "".join(job.lines[num_lines:])
    assert "phase 1 continues after epoch" in later_output, "the workers were not started again"
    check_same_weights(training, trained, phases=(1,))
