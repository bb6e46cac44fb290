"""Callers of an endpoint that compare their answers, and processes that are suspended."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psutil
from serving_runs import Serving, compared


class Callers:
    """Callers who post studies of theirs until told to end, and check every answer."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.is_over = threading.Event()
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []

    def post(self, index: int) -> None:
        """Post the study of one caller again and again."""
        body, expected = self.serving.others[index]
        while not self.is_over.is_set():
            status, answer, retry_after_s = self.serving.post(body)
            self.statuses[status] += 1
            if status == 200:
                self._compare(index, compared(answer["series"]), expected)
            elif status != 503 or not retry_after_s:
                self.wrong.append(f"caller {index} got {status} {answer}")
            time.sleep(0.35 if status == 503 else 0.05)

    def _compare(self, index: int, rows: list[Any], expected: list[Any]) -> None:
        if rows != expected:
            names = ("status", "num_slices", "lesion_volume_ml", "series_uid")
            actual_values = [[row[name] for name in names] for row in rows]
            right_values = [[row[name] for name in names] for row in expected]
            self.wrong.append(f"caller {index} got {actual_values}, expected {right_values}")


@contextlib.contextmanager
def suspended(find: Callable[[], list[psutil.Process]]) -> Iterator[None]:
    """Suspend processes, also those that are started meanwhile, and resume them at the end."""
    is_over = threading.Event()
    stopped: set[psutil.Process] = set()

    def suspend_all() -> None:
        while not is_over.wait(0.05):
            for process in set(find()) - stopped:
                with contextlib.suppress(psutil.Error):
                    process.suspend()
                    stopped.add(process)

    thread = threading.Thread(target=suspend_all)
    thread.start()
    time.sleep(1)  # the processes that run now are suspended before anything is asked of them
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        for process in stopped:
            with contextlib.suppress(psutil.Error):
                process.resume()
