"""Plan of the comparison of segmenters: order, choice of rates, memory, and its tables."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare_networks
from benchmarks.compare_plan import (
    FOLDS,
    FOUR_FLIPS,
    ONE_VIEW,
    RATE_JUDGE,
    RATE_TRAINED,
    Plan,
    Task,
    chosen_rate,
    rate_dice,
    rate_tasks,
    training_tasks,
)
from covtanet.evaluation.overlap import count_rows, overlap

# TP, FP, FN of two slices: Dice 0.5 and 1.
HALF = [[1, 1, 1]]
WHOLE = [[4, 0, 0]]


def result(task: Task, **fields: Any) -> dict[str, Any]:
    """Return the record of a finished task."""
    values: dict[str, Any] = {
        "kind": task.kind,
        "network": task.network,
        "fold": task.fold,
        "rate": task.rate,
    }
    values |= {"label": task.label, "num_steps": task.num_steps, "seed": task.seed}
    values |= {"status": "done", "step_s": 0.01, "peak_gib": 2.0, "losses": [0.5]}
    return values | fields


def judged(rate: float, counts: list[list[int]], network: str = "V8") -> dict[str, Any]:
    """Return the record of a training that chose a rate."""
    task = Task(kind="rate", network=network, num_steps=2, rate=rate)
    return result(task, counts={RATE_JUDGE: {FOUR_FLIPS: counts, ONE_VIEW: counts}})


def training(network: str = "V8", **fields: Any) -> Task:
    """Return a training on fold 2."""
    return Task(kind="training", network=network, num_steps=10, fold=2, **fields)


def test_rates_are_chosen_without_patients_tested_in_folds_0_and_2() -> None:
    tested = {*FOLDS[0], *FOLDS[2]}
    assert not tested & {RATE_JUDGE, *RATE_TRAINED}


def test_dice_that_chooses_a_rate_is_the_mean_over_marked_slices() -> None:
    counts = [*HALF, *WHOLE, [0, 3, 0], [0, 0, 0]]
    expected = overlap(count_rows({RATE_JUDGE: counts}))["per_slice"]["dice"]
    assert rate_dice(judged(1e-3, counts)) == pytest.approx(expected)


def test_best_rate_of_the_judging_patient_is_chosen() -> None:
    rows = [judged(1e-3, HALF), judged(3e-3, WHOLE), judged(6e-3, HALF)]
    assert chosen_rate(rows, "V8") == 3e-3
    assert chosen_rate(rows, "V8, one slice") == 3e-3
    assert chosen_rate(rows, "Unet") is None


def test_equal_numbers_of_steps_give_no_training_twice() -> None:
    labels = [task.label for task in training_tasks(300, 300)]
    assert len(set(labels)) == len(labels)


def test_every_network_of_a_fold_has_a_choice_of_rates() -> None:
    networks = {task.network for task in rate_tasks(2)}
    compared = {task.network for task in training_tasks(600, 300)}
    assert networks == {name for name in compared if not name.startswith("V8, ")}


def test_training_waits_for_all_rates_of_its_network() -> None:
    rate = Task(kind="rate", network="V8", num_steps=2, rate=1e-3)
    plan = Plan([rate, training()], [], memory_gib=50)
    assert plan.take(1000) == rate
    assert plan.take(1000) is None
    assert plan.is_waiting(1000)
    plan.finish(rate, judged(1e-3, HALF))
    assert plan.take(1000) == training(rate=1e-3)


def test_training_longer_than_the_time_left_is_not_started() -> None:
    """10 steps of 0.01 s with margin, and 8 s beside the steps."""
    plan = Plan([training()], [judged(1e-3, HALF)], memory_gib=50)
    assert plan.take(8.1) is None
    assert not plan.is_waiting(8.1)
    assert plan.take(8.2) is not None


def test_training_waits_for_memory_of_running_ones() -> None:
    """Two trainings of 2 GiB do not fit 3 GiB."""
    tasks = [training(), training(seed=1)]
    plan = Plan(tasks, [judged(1e-3, HALF)], memory_gib=3)
    first = plan.take(1000)
    assert first is not None
    assert plan.take(1000) is None
    plan.finish(first, result(first, counts={}))
    assert plan.take(1000) is not None


def test_out_of_memory_puts_a_training_back_once() -> None:
    plan = Plan([training()], [judged(1e-3, HALF)], memory_gib=50)
    for _ in range(2):
        task = plan.take(1000)
        assert task is not None
        plan.finish(task, result(task, status="out_of_memory"))
    assert plan.take(1000) is None


def test_finished_trainings_of_an_earlier_run_are_not_repeated() -> None:
    rows = [judged(1e-3, HALF), result(training(), counts={})]
    plan = Plan([training(), training(seed=1)], rows, memory_gib=50)
    assert plan.take(1000) == training(seed=1, rate=1e-3)


def write_results(folder: Path) -> None:
    """Write V8 with Dice 1 and the Unet with Dice 0.5 on all patients of fold 2."""
    rows = [judged(1e-3, WHOLE)]
    for network, counts in (("V8", WHOLE), ("Unet", HALF)):
        views = {FOUR_FLIPS: counts, ONE_VIEW: counts}
        rows.append(result(training(network), counts=dict.fromkeys(FOLDS[2], views)))
    rows.append(result(training("V7"), status="out_of_memory", message="1 GiB"))
    lines = [json.dumps(row) for row in rows]
    (folder / compare_networks.RESULTS).write_text("\n".join(lines))


def test_tables_have_dice_paired_difference_and_unfinished_trainings(tmp_path: Path) -> None:
    write_results(tmp_path)
    lines = compare_networks.report(compare_networks.read([tmp_path]), "V8")
    dice = "1.000 (1.000 to 1.000)"
    assert f"| V8 | {dice} | {dice} | 1.000 | 1.000 | 1.000 | 1.000 |" in lines
    difference = "+0.500 (+0.500 to +0.500)"
    assert f"| V8 minus Unet | {difference} | {difference} |" in lines
    assert "- V7, fold 2, 10 steps, seed 0: out_of_memory 1 GiB" in lines
    assert "### All six patients" not in lines


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_finished_result_counts_if_a_label_occurs_twice(
    tmp_path: Path, order: tuple[int, int]
) -> None:
    rows = [result(training(), status="cut"), result(training(), counts={})]
    lines = [json.dumps(rows[index]) for index in order]
    (tmp_path / compare_networks.RESULTS).write_text("\n".join(lines))
    assert [row["status"] for row in compare_networks.read([tmp_path])] == ["done"]
