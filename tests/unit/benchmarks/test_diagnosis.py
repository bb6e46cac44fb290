"""Table IV on one slice of each study: the file of slices, the warm start, rows of the table."""

import json
from pathlib import Path

import numpy as np
import torch

from benchmarks import diagnosis_slices
from benchmarks.diagnosis_data import with_context
from benchmarks.diagnosis_networks import COVTANET, SCALE, choices, network_config, start_warm
from benchmarks.diagnosis_table import read_lines, to_rows
from benchmarks.diagnosis_trial import balanced_loss
from covtanet.ct.lung_box import SliceBox
from covtanet.evaluation.output import make_output
from covtanet.model.covtanet import JointClassifier
from covtanet.model.segnet import TASegNet, TASegNetConfig

SIDE = diagnosis_slices.CANVAS_PX


def test_file_of_slices_keeps_masks_and_nearly_all_grey_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # Smooth, as JPEG keeps it: 9 x 9 blocks of 32 pixels.
    grey = np.kron(rng.integers(0, 255, (2, 9, 9)), np.ones((1, 32, 32))).astype(np.uint8)
    written = diagnosis_slices.Slices(
        names=np.array(["a", "b"]),
        grades=np.array(["normal", "severe"]),
        folds=np.array([0, 1]),
        grey=grey,
        lung=rng.random((2, SIDE, SIDE)) < 0.5,
        inside=rng.random((2, SIDE, SIDE)) < 0.5,
        refused=("c",),
    )
    diagnosis_slices.write(tmp_path / "slices.npz", written)
    read = diagnosis_slices.read(tmp_path / "slices.npz")
    assert np.array_equal(read.lung, written.lung)
    assert np.array_equal(read.inside, written.inside)
    assert np.abs(read.grey.astype(int) - grey).mean() < 3
    assert (read.names.tolist(), read.refused) == (["a", "b"], ("c",))
    assert read.some(np.array([1])).grades.tolist() == ["severe"]


def test_context_is_an_eighth_of_the_box_about_its_middle() -> None:
    box = with_context(SliceBox(top=100, left=50, height=256, width=256))
    assert box == SliceBox(top=84, left=34, height=288, width=288)


def test_loss_gives_both_classes_of_each_task_the_same_weight() -> None:
    grades = np.array(["normal"] * 2 + ["mild"] * 6 + ["severe"] * 2)
    weights = balanced_loss(grades)
    # 2 normal against 8 infected; 6 mild against 2 severe.
    assert (weights.infected_weight, weights.severe_weight) == (0.25, 3.0)


def test_warm_start_copies_the_segmenters_final_filter() -> None:
    config = network_config(COVTANET, SCALE, choices(COVTANET)[0])
    assert isinstance(config.segnet, TASegNetConfig)
    segmenter = TASegNet(config.segnet)
    module = JointClassifier(config)
    start_warm(module, segmenter)
    state = module.state_dict()
    source = segmenter.filter.state_dict()
    assert torch.equal(state["regional.stages.0.0.weight"][:16], source["0.weight"])
    assert torch.equal(state["regional.stages.0.1.weight"][:16], source["1.weight"])
    kernel = state["regional.stages.0.3.weight"][0]
    assert torch.equal(kernel[:16, 1, 1], source["3.weight"][0, :, 0, 0])
    assert int(torch.count_nonzero(kernel)) == 16


def test_lines_of_a_run_become_rows_of_table_iv(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [{"kind": "choice", "network": "Lesion share"}]
    for index, grade in enumerate(("normal", "mild", "severe") * 2):
        p = {"normal": 0.1, "mild": 0.6, "severe": 0.9}[grade]
        row = {"study": str(index), "grade": grade, "p_infected": p, "p_severe": p - 0.05}
        lines.append({"kind": "row", "network": "Lesion share", "fold": index // 3, **row})
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "rows-0.jsonl").write_text(text + "\n")
    rows = to_rows(read_lines(tmp_path))
    output = make_output(rows, {}, "here", is_second_data_set=False)
    table = output.files["tables.md"].decode()
    # Sensitivity and specificity of a perfect row, mild against severe at p_severe of 0.55.
    assert "| Lesion share | ours, fold 0+1: 6 volumes | 100.0±0.00 | 100.0±0.00 |" in table
    assert "| Lesion share | 1.000 (1.000 to 1.000), 1.000 |" in table
