"""Samples read from storage every epoch: order, windows, neighbours, reading ahead."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training import CONFIG, build, curve, slice_rows

from covtanet import storage
from covtanet.data.prepared import PreparedVolume, Samples
from covtanet.data.prepared_file import to_parquet
from covtanet.training.feed import Lane, Rows, Sampling, series_of, steps
from covtanet.training.loop import Progress, fit
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.ranks import Ranks
from covtanet.training.sample_files import SampleFile, read_slices, slice_name
from covtanet.training.stream import SampleStream, StreamLane
from covtanet.training.stream_plan import plan_epoch, plan_lane

PX = 4
NUM_BYTES = 3 * PX * PX


def slice_file(series: str, count: int, *, is_continuous: bool = True) -> SampleFile:
    return SampleFile(
        series=series,
        uri=f"{series}.parquet",
        names=tuple(slice_name(series, index) for index in range(count)),
        has_lesion=tuple(index % 2 == 0 for index in range(count)),
        bytes_per_sample=NUM_BYTES,
        is_continuous=is_continuous,
    )


def some_files(sizes: Sequence[int]) -> list[SampleFile]:
    return [slice_file(f"s{number:02d}", count) for number, count in enumerate(sizes)]


SIZES = (7, 12, 9, 10, 5, 14, 8, 11, 6, 10)


def numbered_slices(file: SampleFile) -> Rows:
    """Return slices whose pixels hold the slice's number."""
    count = len(file.names)
    levels = np.broadcast_to(np.arange(count, dtype=np.uint16)[:, None, None], (count, PX, PX))
    return {
        "name": np.array(file.names),
        "has_lesion": np.array(file.has_lesion),
        "levels": levels,
        "lesion": levels.astype(np.uint8) % 2,
    }


@dataclass
class CountedReads:
    """Reads numbered slices and remembers which files it read."""

    series: list[str] = field(default_factory=list)

    def __call__(self, file: SampleFile) -> Rows:
        self.series.append(file.series)
        return numbered_slices(file)


def stream_of(
    files: Sequence[SampleFile], num_lanes: int = 1, batch_size: int = 4, window: int = 1 << 20
) -> SampleStream:
    sampling = Sampling(batch_size=batch_size)
    return SampleStream(files, sampling, numbered_slices, num_lanes, 3, window_bytes=window)


def names_of(batches: Sequence[Rows]) -> list[str]:
    return [str(name) for batch in batches for name in batch["name"]]


@pytest.mark.parametrize("num_lanes", [1, 2, 3])
def test_streamed_epoch_takes_every_sample_once(num_lanes: int) -> None:
    files = some_files(SIZES)
    stream = stream_of(files, num_lanes, window=20 * NUM_BYTES)
    dealt = [list(stream.lane(number).batches(1)) for number in range(num_lanes)]
    names = [name for batches in dealt for name in names_of(batches)]
    assert sorted(names) == sorted(name for file in files for name in file.names)
    assert {len(batches) for batches in dealt} == {stream.lane().num_batches(1)}
    sizes = [len(batch["name"]) for batches in dealt for batch in batches]
    assert min(sizes) >= 2
    assert max(sizes) <= 4


def test_streamed_order_is_another_one_every_epoch_and_the_same_after_a_restart() -> None:
    turned = some_files(SIZES)[::-1]
    lane = stream_of(some_files(SIZES), 2).lane(1)
    orders = [names_of(list(lane.batches(epoch))) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    # Of a training that starts at the last epoch, and lists its files in another order.
    assert names_of(list(stream_of(turned, 2).lane(1).batches(2))) == orders[2]


def test_lanes_of_a_stream_have_other_volumes_every_epoch() -> None:
    lane = stream_of(some_files(SIZES), 2).lane(0)
    series = [frozenset(map(series_of, names_of(list(lane.batches(epoch))))) for epoch in range(3)]
    assert len(set(series)) > 1


def test_window_mixes_volumes_and_bounds_the_memory() -> None:
    files = some_files([10] * 20)
    sampling = Sampling(batch_size=4)
    plan = plan_epoch(files, sampling, 1, 0)
    lane = plan_lane(files, plan, sampling, 0, 0, window_bytes=50 * NUM_BYTES)
    assert [len(window) for window in lane.windows] == [5, 5, 5, 5]
    # Micro-batches take the windows one after the other.
    windows = [sample.window for batch in lane.batches for sample in batch]
    assert windows == sorted(windows)
    patients = [len({sample.file for sample in batch}) for batch in lane.batches]
    assert np.mean(patients) > 2.5


def test_stream_reads_every_file_once_per_epoch_and_the_next_window_ahead() -> None:
    files = some_files([10] * 8)
    read = CountedReads()
    stream = SampleStream(
        files, Sampling(batch_size=5), read, num_epochs=2, window_bytes=20 * NUM_BYTES
    )
    lane = stream.lane()
    batches = lane.batches(0)
    next(batches)
    finish_reading(lane)
    # This window and the next one of two files each.
    assert len(read.series) == 4
    assert len(list(batches)) == 15
    finish_reading(lane)
    # All of the first epoch, and the first window of the second.
    assert len(read.series) == 10
    assert len(list(lane.batches(1))) == 16
    finish_reading(lane)
    # No window of an epoch that is not trained.
    assert Counter(read.series) == Counter({file.series: 2 for file in files})


def finish_reading(lane: StreamLane) -> None:
    """Wait for all files that the lane has asked for."""
    for files in lane._windows.values():
        for future in files.values():
            future.result()


def test_streamed_slices_have_neighbours_of_their_volume() -> None:
    files = [slice_file("a", 9), slice_file("b", 9, is_continuous=False)]
    stream = SampleStream(files, Sampling(batch_size=6), numbered_slices, 1, 2, 1)
    batches = list(stream.lane().batches(0))
    assert {batch["levels"].shape for batch in batches} == {(6, 3, PX, PX)}
    repeated = list(stream.lane().batches(0))
    for batch, other in zip(batches, repeated, strict=True):
        assert np.array_equal(batch["levels"], other["levels"])
        for name, channels in zip(batch["name"].tolist(), batch["levels"][:, :, 0, 0], strict=True):
            series, _, number = name.partition(":")
            assert channels[1] == int(number)
            assert series == "a" or set(channels.tolist()) == {int(number)}
    # In validation the adjacent slices.
    first = next(stream.lane().in_order())
    assert first["levels"][:, 0, 0, 0].tolist() == [0, 0, 1, 2, 3, 4]
    assert first["levels"][:, 2, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]


def test_validation_of_a_stream_has_all_samples_in_order() -> None:
    files = some_files(SIZES)
    found = names_of(list(stream_of(files[::-1]).lane().in_order()))
    assert found == [name for file in files for name in file.names]


def test_too_few_files_for_the_lanes_give_no_step() -> None:
    assert stream_of(some_files([9]), 2).lane().num_batches(0) == 0


def test_lane_with_more_samples_than_its_steps_leaves_some_out() -> None:
    """Of 3 and 100 slices: one step, of at most 4 slices in a lane."""
    stream = stream_of(some_files([3, 100]), 2)
    sizes = [[len(batch["name"]) for batch in stream.lane(number).batches(0)] for number in (0, 1)]
    assert sorted(sizes) == [[3], [4]]


def test_error_of_a_reading_thread_reaches_the_training() -> None:
    def fail(file: SampleFile) -> Rows:
        raise OSError("storage does not answer")

    stream = SampleStream(some_files(SIZES), Sampling(batch_size=2), fail)
    with pytest.raises(OSError, match="storage does not answer"):
        list(steps([stream.lane()], 0, 2))


def test_prepared_file_is_read_as_its_description_names_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 65535, (3, PX, PX), dtype=np.uint16)
    lesion = rng.integers(0, 2, (3, PX, PX), dtype=np.uint8)
    volume = PreparedVolume(
        key="v", volume_path="v.nii", patient="p", intensity="hu", slices=(4, 5, 9),
        lesion_px=tuple(int(mask.sum()) for mask in lesion), size_px=PX,
    )  # fmt: skip
    uri = str(tmp_path / "v.parquet")
    storage.write_bytes(uri, to_parquet(volume, Samples(levels=levels, lesion=lesion)))
    names = tuple(slice_name("v", index) for index in volume.slices)
    file = SampleFile(
        series="v", uri=uri, names=names, has_lesion=(True,) * 3, bytes_per_sample=NUM_BYTES
    )
    rows = read_slices(file, PX)
    assert tuple(rows["name"].tolist()) == names
    assert np.array_equal(rows["levels"], levels)
    assert np.array_equal(rows["lesion"], lesion)
    other = SampleFile(
        series="v", uri=uri, names=names[:2], has_lesion=(True,) * 2, bytes_per_sample=NUM_BYTES
    )
    stream = SampleStream([other], Sampling(batch_size=2), lambda each: read_slices(each, PX))
    with pytest.raises(RuntimeError, match="file of v: other samples than its description names"):
        list(stream.lane().batches(0))


def test_interrupted_streamed_training_ends_with_the_same_weights() -> None:
    """Two lanes of three volumes, continued after the first of two epochs."""
    config = replace(CONFIG, num_epochs=2)
    undisturbed = train_streamed(config, Progress())
    stopped = train_streamed(replace(config, num_epochs=1), Progress())
    continued = train_streamed(config, stopped)
    assert curve(continued) == curve(undisturbed)
    for name, value in undisturbed.weights.items():
        assert torch.equal(continued.weights[name], value), name


def train_streamed(config: PhaseConfig, progress: Progress) -> Progress:
    rows = {f"series{number}": slice_rows(8, number) for number in range(3)}
    files = [
        SampleFile(
            series=series,
            uri="",
            names=tuple(columns["name"].tolist()),
            has_lesion=tuple(columns["has_lesion"].tolist()),
            bytes_per_sample=1,
        )
        for series, columns in rows.items()
    ]
    sampling = Sampling(batch_size=config.batch_size)
    stream = SampleStream(
        files, sampling, lambda file: rows[file.series], 2, config.num_epochs, window_bytes=10
    )
    phase = build(1, config, Ranks())
    lanes: dict[int, Lane] = {number: stream.lane(number) for number in range(2)}
    return fit(config, phase, lanes, Ranks(), 0, progress, lambda _: None)
