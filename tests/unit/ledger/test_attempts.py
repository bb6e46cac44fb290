"""Attempts at a series whose workers die, and which of them count."""

from collections.abc import Callable

import pytest

from covtanet import storage
from covtanet.ledger.attempts import Attempts, AttemptsOfSeries, Worker
from covtanet.ledger.run import Run

NODES = {"one", "two"}


@pytest.fixture
def attempts(run: Run) -> Attempts:
    return Attempts(run, lambda: NODES, {})


@pytest.fixture
def new_worker() -> Callable[..., Worker]:
    """Return another process each time, as Ray starts one after a death."""
    pids = iter(range(1, 100))

    def start(node_id: str = "one") -> Worker:
        pid = next(pids)
        return Worker(worker_id=f"worker-{pid}", node_id=node_id, pid=pid)

    return start


def test_series_that_kills_its_workers_is_tried_three_times_and_no_more(
    attempts: Attempts, new_worker: Callable[..., Worker]
) -> None:
    outcomes = [attempts.begin("deadly", "decode", new_worker()) for _ in range(5)]
    assert outcomes == [True, True, True, False, False]
    assert attempts.begin("deadly", "predict", new_worker())
    assert attempts.begin("other", "decode", new_worker())


def test_series_that_its_worker_survives_is_forgotten(
    attempts: Attempts, new_worker: Callable[..., Worker]
) -> None:
    """Ray repeats a lost block: that is no death of a worker."""
    worker = new_worker()
    assert all(attempts.begin(key, "decode", worker) for key in ("a", "b") * 5)


def test_call_that_ray_repeats_neither_counts_nor_forgets(
    attempts: Attempts, new_worker: Callable[..., Worker]
) -> None:
    """Its answer was lost with a connection, and the worker goes on with the same series."""
    workers = [new_worker() for _ in range(3)]
    for worker in workers:
        assert attempts.begin("deadly", "decode", worker)
        assert attempts.begin("deadly", "decode", worker)
    assert not attempts.begin("deadly", "decode", new_worker())


def test_neighbours_of_a_deadly_series_in_its_block_are_not_charged(
    attempts: Attempts, new_worker: Callable[..., Worker]
) -> None:
    """Each new worker begins the block again, and dies of the second series."""
    outcomes = []
    for _ in range(4):
        worker = new_worker()
        outcomes.append([attempts.begin(key, "decode", worker) for key in ("first", "deadly")])
    assert outcomes == [[True, True]] * 3 + [[True, False]]
    assert attempts.begin("third", "decode", worker)


def test_attempts_on_lost_nodes_do_not_count_but_end_after_six(
    run: Run, new_worker: Callable[..., Worker]
) -> None:
    attempts = Attempts(run, lambda: {"one"}, {})
    outcomes = [attempts.begin("unlucky", "decode", new_worker("lost")) for _ in range(7)]
    assert outcomes == [True] * 6 + [False]
    mixed = [attempts.begin("mixed", "decode", new_worker(node)) for node in ("lost", "one") * 3]
    assert mixed == [True] * 6
    assert not attempts.begin("mixed", "decode", new_worker())


def test_first_attempt_writes_nothing_and_second_survives_the_counting_process(
    run: Run, new_worker: Callable[..., Worker]
) -> None:
    attempts = Attempts(run, lambda: NODES, {})
    assert attempts.begin("deadly", "decode", new_worker())
    assert not noted(run)
    assert attempts.begin("deadly", "decode", new_worker())
    assert noted(run) == ["deadly-decode.json"]
    restarted = Attempts(run, lambda: NODES, {})
    outcomes = [restarted.begin("deadly", "decode", new_worker()) for _ in range(2)]
    assert outcomes == [True, False]


def test_note_of_a_survived_series_is_removed(
    attempts: Attempts, run: Run, new_worker: Callable[..., Worker]
) -> None:
    """Or a restart of the counting process would count it again."""
    attempts.begin("unlucky", "decode", new_worker())
    worker = new_worker()
    attempts.begin("unlucky", "decode", worker)
    assert noted(run) == ["unlucky-decode.json"]
    attempts.begin("next", "decode", worker)
    assert not noted(run)


def test_repeated_call_of_a_worker_is_one_attempt(
    attempts: Attempts, run: Run, new_worker: Callable[..., Worker]
) -> None:
    """Ray repeats a call whose answer was lost when the counting process died."""
    attempts.begin("series", "decode", new_worker())
    worker = new_worker()
    attempts.begin("series", "decode", worker)
    restarted = Attempts(run, lambda: NODES, {})
    assert restarted.begin("series", "decode", worker)
    outcomes = [restarted.begin("series", "decode", new_worker()) for _ in range(2)]
    assert outcomes == [True, False]


def test_attempts_on_lost_nodes_are_taken_to_the_next_plan(
    run: Run, new_worker: Callable[..., Worker]
) -> None:
    """A series that takes its node down each time ends, however many plans it outlives."""
    earlier: AttemptsOfSeries = {}
    for number in range(6):
        node = f"node-{number}"
        attempts = Attempts(make_again(run), lambda: {"other"}, earlier)
        assert attempts.begin("deadly", "decode", new_worker(node))
        assert attempts.begin("innocent", "decode", new_worker("other"))
        earlier = attempts.on_lost_nodes()
        assert earlier.keys() == {("deadly", "decode")}
    attempts = Attempts(make_again(run), lambda: {"other"}, earlier)
    assert not attempts.begin("deadly", "decode", new_worker("other"))


def test_store_that_refuses_the_note_stops_no_attempt(
    attempts: Attempts,
    new_worker: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(uri: str, data: bytes) -> None:
        raise OSError("the object store answered 503 SlowDown")

    monkeypatch.setattr(storage, "write_bytes", fail)
    outcomes = [attempts.begin("deadly", "decode", new_worker()) for _ in range(4)]
    assert outcomes == [True, True, True, False]


def test_each_driver_counts_for_itself(run: Run, new_worker: Callable[..., Worker]) -> None:
    """A driver that dies takes the series in flight with it; that is no fault of theirs."""
    for _ in range(5):
        driver = make_again(run)
        assert driver.driver != run.driver
        assert driver == run
        attempts = Attempts(driver, lambda: NODES, {})
        assert all(attempts.begin("series", "decode", new_worker()) for _ in range(3))


def noted(run: Run) -> list[str]:
    return storage.list_names(run.work_uri("attempts", run.driver))


def make_again(run: Run) -> Run:
    """The same run, as another process makes it."""
    return Run(**{name: value for name, value in vars(run).items() if name != "driver"})
