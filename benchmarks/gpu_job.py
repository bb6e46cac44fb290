"""The screening job and the endpoint on a machine with a GPU, with each engine in turn.

python -m benchmarks.gpu_job --out DIR [--series 24] [--engine NAME ...]

Copies of one real chest CT (COVTANET_REAL_CT; else phantoms of its size) are screened by
``jobs/screen.py`` with its own Ray. The first engine is the one that the others are compared with.
Then a study is posted to an endpoint whose model holds half a GPU. DIR/gpu_job.md has the tables
and is written anew after every engine. Without a GPU: ``--engine openvino``, to see that it runs.
"""

import argparse
import io
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.measure import CORES, ROOT, WORK, say
from benchmarks.real_archive import real_archive
from benchmarks.screening_runs import JobRun, run_job
from benchmarks.serving import running_endpoint

MODEL = ROOT / "models" / "v8-lung-box"
ENGINES = ("channels_last", "cuda-bf16")
QUERY = ("nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits")
SAMPLE_EVERY_MS = 500
HEAD = (
    "| engine | start, s | series a minute | CPU s a series | GPU in use | GPU memory, MiB "
    "| largest difference of involvement |\n|---|---|---|---|---|---|---|"
)
POST_HEAD = (
    "| post | status | engine | seconds | difference of involvement |\n|---|---|---|---|---|"
)
NUM_POSTS = 3


class Utilization:
    """What nvidia-smi says of the first GPU while something runs; nothing without a GPU."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        """Percent of the time in which a kernel ran, and MiB of memory in use."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sample until the block ends."""
        if not torch.cuda.is_available():
            yield
            return
        command = [*QUERY, f"--loop-ms={SAMPLE_EVERY_MS}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            reader = threading.Thread(target=self._read, args=(process,))
            reader.start()
            try:
                yield
            finally:
                process.terminate()
                reader.join()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            percent, memory = line.split(",")
            self.samples.append((float(percent), float(memory)))

    def share(self, last_s: float) -> str:
        """Return the mean use over the last seconds of the samples."""
        count = int(1000 * last_s / SAMPLE_EVERY_MS)
        values = [percent for percent, _ in self.samples[-count:]]
        return f"{sum(values) / len(values):.0f} %" if values else "no GPU"

    def memory(self) -> str:
        """Return the most memory in use."""
        return f"{max(memory for _, memory in self.samples):.0f}" if self.samples else "no GPU"


def job_line(engine: str, run: JobRun, gpu: Utilization, expected: dict[str, float]) -> str:
    """Return a line of the table of jobs. expected: involvement by series."""
    found = involvement(run)
    if found.keys() != expected.keys():
        raise SystemExit(f"{engine}: {len(found)} series screened, expected {len(expected)}")
    difference = max(abs(found[key] - expected[key]) for key in expected)
    values = (
        engine,
        f"{run.start_s:.1f}",
        f"{60 * run.ledger.num_rows / run.spent_s:.1f}",
        f"{run.cpu_s / run.ledger.num_rows:.2f}",
        gpu.share(run.spent_s),
        gpu.memory(),
        f"{difference:.4f}",
    )
    return "| " + " | ".join(values) + " |"


def involvement(run: JobRun) -> dict[str, float]:
    """Return the involvement of the series that were screened, by the name of their folder."""
    rows = run.ledger.select(["source_uri", "involvement"]).to_pylist()
    return {
        Path(row["source_uri"]).name: row["involvement"]
        for row in rows
        if row["involvement"] is not None
    }


def configured(engine: str) -> Path:
    """Return the path of a configuration that names an engine."""
    path = WORK / f"engine-{engine}.toml"
    path.write_text(f'[screening]\nengine = "{engine}"\n')
    return path


def post_lines(engine: str, series: Path, expected: float) -> list[str]:
    """Post one series several times to an endpoint; return lines of the table."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for path in sorted(series.rglob("*.dcm")):
            archive.write(path, path.name)
    lines = []
    with running_endpoint(
        WORK / "gpu-endpoint", str(MODEL), config=str(configured(engine)),
        model_gpus=0.5 if torch.cuda.is_available() else 0.0,
    ) as endpoint:  # fmt: skip
        for number in range(NUM_POSTS):
            started = time.perf_counter()
            status, answer, _ = endpoint.post(body.getvalue())
            spent_s = time.perf_counter() - started
            if status != 200:
                raise SystemExit(f"{status}: {answer}")
            (row,) = answer["series"]
            difference = abs(row["involvement"] - expected)
            values = (number + 1, status, row["engine"], f"{spent_s:.2f}", f"{difference:.4f}")
            lines.append("| " + " | ".join(map(str, values)) + " |")
    return lines


def main() -> int:
    """Screen with every engine, then post."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--series", type=int, default=24)
    options.add_argument("--engine", action="append")
    arguments = options.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(exist_ok=True)
    engines = arguments.engine or list(ENGINES)
    folder, text = real_archive(arguments.series)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = [f"{text}; {device}, {CORES} cores, torch {torch.__version__}", "", HEAD]

    def note(*new: str) -> None:
        lines.extend(new)
        say("\n".join(new))
        (arguments.out / "gpu_job.md").write_text("\n".join(lines) + "\n")

    expected: dict[str, float] = {}
    for engine in engines:
        gpu = Utilization()
        with gpu.watched():
            run = run_job(folder, model=MODEL, options=["--config", str(configured(engine))])
        expected = expected or involvement(run)
        note(job_line(engine, run, gpu, expected))
    first = sorted(folder.iterdir())[0]
    note("", POST_HEAD, *post_lines(engines[-1], first, expected[first.name]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
