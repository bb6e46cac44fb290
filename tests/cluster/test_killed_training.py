"""The one training fault of ``make test``; ``make faults SUITE=training`` runs all of them."""

from training_runs import TrainingRun, TrainingSetup, check_same_weights, kill_and_cut


def test_killed_driver_and_cut_checkpoint_leave_no_trace(
    training_setup: TrainingSetup, trained: TrainingRun
) -> None:
    """The driver dies and its newest checkpoint is cut; the same command goes on."""
    training = training_setup.training("cut", more="phases = [1]")
    kill_and_cut(training)
    job = training.start()
    assert job.finish() == 0, job.output[-4000:]
    assert "phase 1 continues after epoch" in job.output, "the training began anew"
    assert "a checkpoint is left out" in job.output, "the cut checkpoint was taken"
    check_same_weights(training, trained, phases=(1,))
