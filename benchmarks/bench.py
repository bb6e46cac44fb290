"""make bench: ratios of what was measured side by side in this one run, as a table and as Markdown.

Machines differ and are noisy, so no absolute time is a result; every figure is a ratio of two measurements that took
turns. ``--part NAME`` runs one part.
"""

import argparse
import copy
import gzip
import math
import os
import platform
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import safe_decode
import serving
import SimpleITK
import torch
import training

from covtanet import storage
from covtanet.archive import manifest
from covtanet.ct import dicom, dicom_headers, nifti
from covtanet.ct.volume import SourceGrid
from covtanet.ct.window import WindowConfig
from covtanet.decoding.sandbox import Sandbox
from covtanet.errors import CovtanetError
from covtanet.inference.engine import ENGINES, build_engine
from covtanet.inference.predictor import Predictor, window_of
from covtanet.model.checkpoint import SavedModel, load_model, save_model
from covtanet.model.covtanet import INPUT_PX, SIZES, CovTANet
from covtanet.model.description import Capabilities, Preprocessing
from covtanet.phantoms.archive import write_archive
from covtanet.phantoms.encodings import dicom_objects, nifti_grid
from covtanet.phantoms.phantom import PhantomConfig, make_phantom
from covtanet.phantoms.sampling import configs
from covtanet.phantoms.training_set import write_training_set
from covtanet.screening import stages
from covtanet.screening.config import ScreeningConfig, for_model
from covtanet.screening.study import Screener

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".bench"
CORES = len(os.sched_getaffinity(0))
ROUNDS = 5
ENGINE_PX, ENGINE_BATCH = 256, 4


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    part: str
    what: str
    value: str
    wanted: str = ""


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def side_by_side(works: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each; they take turns, after one turn that does not count."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    return {name: statistics.median(taken) for name, taken in times.items()}


def bench_network() -> list[Figure]:
    """(a) the machine's matrix rate and (b) every engine's share of it, at the paper's widths."""
    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    network = CovTANet(SIZES["paper"]).eval().requires_grad_(False)
    slices = np.random.default_rng(0).random(
        (ENGINE_BATCH, 1, ENGINE_PX, ENGINE_PX), dtype=np.float32
    )
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        network.segnet(torch.from_numpy(slices))
    matrix = torch.rand(2048, 2048)
    works: dict[str, Callable[[], object]] = {"gemm": lambda: matrix @ matrix}
    answers = {}
    for name in ENGINES:
        engine = build_engine(copy.deepcopy(network), ENGINE_PX, name, CORES)
        answers[name] = engine.segment(slices)[0]
        works[name] = lambda engine=engine: engine.segment(slices)
    taken = side_by_side(works)
    rate = 2 * 2048**3 / taken["gemm"]
    figures = [Figure("a", "GEMM, GFLOP/s of this run (what shares refer to)", f"{rate / 1e9:.0f}")]
    for name in ENGINES:
        share = counter.get_total_flops() / taken[name] / rate
        ratio = taken["eager"] / taken[name]
        apart = float(np.abs(answers[name] - answers["eager"]).max())
        wanted = ">= 1.8 x" if name == "openvino" else ""
        text = f"{share:.2f} of GEMM, {ratio:.2f} x eager, differs by {apart:.0e}"
        figures.append(Figure("b", f"network, {name}", text, wanted))
    return figures


def bench_decode() -> list[Figure]:
    """(d) decoding against nibabel and SimpleITK."""
    folder = WORK / "decode"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "dicom").mkdir(parents=True)
    if safe_decode.REAL_SERIES.exists():
        objects = [path.read_bytes() for path in sorted(safe_decode.REAL_SERIES.iterdir())]
        volume = dicom.read_series(objects, num_threads=CORES)
        hu, affine, source = volume.hu, volume.affine, "a real series, JPEG Lossless"
        dicom_folder = safe_decode.REAL_SERIES
    else:
        phantom = make_phantom(
            PhantomConfig(involvement=0.3, size_px=512, num_slices=120, pixel_mm=0.7, slice_mm=2.25)
        )
        hu, affine, source = phantom.hu, phantom.affine, "a phantom, uncompressed"
        objects = dicom_objects(phantom, 1)
        dicom_folder = folder / "dicom"
        for index, data in enumerate(objects):
            (dicom_folder / f"{index:04d}.dcm").write_bytes(data)
    path = folder / "volume.nii.gz"
    path.write_bytes(nifti.write(hu, SourceGrid(shape=hu.shape, affine=affine)))

    def itk() -> object:
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(dicom_folder)))
        return SimpleITK.GetArrayFromImage(reader.Execute())

    def ours() -> object:
        return dicom.read_series([each.read_bytes() for each in dicom_folder.iterdir()])

    taken = side_by_side(
        {
            "nibabel": lambda: nib.load(path).get_fdata(),
            "nifti": lambda: nifti.read(path.read_bytes()),
            "itk": itk,
            "dicom": ours,
        },
        rounds=3,
    )
    return [
        Figure(
            "d",
            ".nii.gz against nibabel get_fdata",
            f"{taken['nibabel'] / taken['nifti']:.2f} x",
            ">= 1.7 x",
        ),
        Figure(
            "d",
            f"DICOM ({source}), one thread, against SimpleITK",
            f"{taken['itk'] / taken['dicom']:.2f} x",
            ">= 1 x",
        ),
    ]


def bench_sandbox() -> list[Figure]:
    """(s) decoding in the sandbox against decoding in the worker itself, and what hostile input takes of memory."""
    window, config = WindowConfig(size_px=512), ScreeningConfig()
    phantom = make_phantom(safe_decode.LARGE)
    objects = dicom_objects(phantom, 1)
    gzipped = nifti.write(phantom.hu, SourceGrid(shape=phantom.hu.shape, affine=phantom.affine))
    figures = [
        Figure("s", f"safe decode over unsafe, {name}", f"{ratio:.2f} x", "<= 1.05 x")
        for name, ratio in safe_decode.measure().items()
    ]
    sound = peak_of_child(window, config, "dicom", [[data] for data in objects])
    sound = max(sound, peak_of_child(window, config, "nifti", [[gzipped]]))
    figures.append(
        Figure("s", "memory of a sound series of 512 x 512 x 300", f"{sound / 2**20:.0f} MiB")
    )
    for name, (source_format, hostile) in hostile_input().items():
        more = peak_of_child(window, config, source_format, hostile) - sound
        figures.append(
            Figure("s", f"more memory for {name}", f"{max(0, more) / 2**20:.0f} MiB", "<= 1536 MiB")
        )
    return figures


def hostile_input() -> dict[str, tuple[str, Iterable[list[bytes]]]]:
    """A gzip bomb, a header that asks for all that is allowed and keeps its word, a deflated object, 30,000 slices."""
    phantom = make_phantom(
        PhantomConfig(seed=9, size_px=64, num_slices=12, pixel_mm=5.6, slice_mm=18)
    )
    plain = gzip.decompress(nifti.write(phantom.hu, nifti_grid(phantom)))
    header = bytearray(plain[:352])
    struct.pack_into("<4h", header, 40, 3, 1024, 1024, 500)
    struct.pack_into("<2h", header, 70, 64, 64)  # float64
    zeros = gzip.compress(bytes(1 << 30), 9)
    objects = dicom_objects(phantom, 9)
    return {
        "a gzip bomb of 4 GiB": ("nifti", [[gzip.compress(plain) + zeros * 4]]),
        "a header of 4 GiB that keeps its word": (
            "nifti",
            [[gzip.compress(bytes(header)) + zeros * 4]],
        ),
        "a deflated DICOM of 1 GiB": ("dicom", [[deflated(objects[0], 1 << 30)]]),
        "a series of 30,000 slices": ("dicom", ([objects[0]] for _ in range(30_000))),
    }


def deflated(data: bytes, num_bytes: int) -> bytes:
    """An object in the deflated syntax, with zeros behind its end."""
    dataset = pydicom.dcmread(BytesIO(data))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    start = dicom_headers.transfer_syntax(buffer.getvalue())[1]
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = stream.compress(
        zlib.decompress(buffer.getvalue()[start:], -zlib.MAX_WBITS) + bytes(num_bytes)
    )
    return buffer.getvalue()[:start] + packed + stream.flush()


def peak_of_child(
    window: WindowConfig,
    config: ScreeningConfig,
    source_format: str,
    objects: Iterable[list[bytes]],
) -> int:
    """The most memory that a fresh decoder's child takes for one series, in bytes beyond what it starts with."""
    sandbox = Sandbox(window, config.slice_step_mm, config.decode_limits)
    child = psutil.Process(sandbox.child.warm().pid)
    before, peak, is_over = child.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.01):
            with suppress(psutil.Error):
                peak = max(peak, child.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with suppress(CovtanetError):
        sandbox(source_format, objects)
    is_over.set()
    watcher.join()
    sandbox.close()
    return max(0, peak - before)


def model_folder() -> Path:
    """An untrained network: speed does not depend on the weights."""
    folder = WORK / "model"
    if not folder.exists():
        torch.manual_seed(0)
        model = SavedModel(
            network=CovTANet(SIZES["small"]),
            preprocessing=Preprocessing(size_px=INPUT_PX["small"]),
            capabilities=Capabilities(segments=True, diagnoses=True),
        )
        save_model(folder, model)
    return folder


def archive(count: int, size_px: int, num_slices: int) -> Path:
    """Sound phantoms, NIfTI and DICOM in turn, and the damaged kinds."""
    folder = WORK / f"archive-{count}-{size_px}-{num_slices}"
    if not folder.exists():
        print(f"  making {count} series of {size_px} x {size_px} x {num_slices}", flush=True)
        sound = count - 17
        write_archive(
            str(folder), str(folder) + "-truth", list(configs(sound, 5, size_px, num_slices)), CORES
        )
    return folder


def plain_loop(folder: Path) -> None:
    """The same stages over the same series in one process: no Ray, one series after the other."""
    config = ScreeningConfig()
    model = load_model(model_folder())
    window = window_of(model)
    predictor, decoder = Predictor(model, num_threads=CORES), stages.in_process(window, config)
    for prefix, objects in storage.walk(str(folder)):
        series, _ = manifest.scan_folder(
            prefix,
            objects,
            lambda path, size: storage.read_bytes(f"{folder}/{path}", size),
            dicom_headers.read_identities,
        )
        for each in series:
            row = stages.prepare_series(
                each.to_row(), archive=str(folder), window=window, config=config, decoder=decoder
            )
            stages.measure_series(stages.predict_series(row, predictor), config)


class Memory:
    """What a process and all its children hold together, as proportional set size, twice a second.

    samples: moment and bytes.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.samples: list[tuple[float, int]] = []
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stopped.wait(0.5):
            total = 0
            try:
                family = [
                    psutil.Process(self.pid),
                    *psutil.Process(self.pid).children(recursive=True),
                ]
            except psutil.Error:
                return
            for process in family:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.samples.append((time.time(), total))

    def peak_bytes(self, after: float = 0, before: float = math.inf) -> int:
        """The most between two moments."""
        return max(held for moment, held in self.samples if after <= moment <= before)


@dataclass(frozen=True, kw_only=True)
class JobRun:
    """A screening of a folder: when its first series was begun, when its ledger was there, what it held."""

    started: float
    ended: float
    memory: Memory
    ledger: pa.Table


def run_job(folder: Path, beside: Callable[[int, threading.Event], None] | None = None) -> JobRun:
    """Screen a folder on a Ray of its own. beside: gets the job's pid and what tells its end, in a thread."""
    with tempfile.TemporaryDirectory() as ledger:
        process = subprocess.Popen(
            [
                sys.executable, ROOT / "jobs" / "screen.py", "--archive", folder, "--ledger", ledger,
                "--model", model_folder(),
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        )  # fmt: skip
        assert process.stdout is not None
        started, output = 0.0, []
        since_first = re.compile(r"series in ([\d.]+) s since work on the first began")
        is_over = threading.Event()
        if beside is not None:
            threading.Thread(target=beside, args=(process.pid, is_over), daemon=True).start()
        with Memory(process.pid) as memory:
            for line in process.stdout:
                output.append(line)
                if found := since_first.search(line):
                    started = time.time() - float(found[1])
        is_over.set()
        if process.wait():
            raise SystemExit("".join(output))
        (committed,) = Path(ledger).glob("date=*/*.parquet")
        return JobRun(
            started=started,
            ended=committed.stat().st_mtime,
            memory=memory,
            ledger=pq.ParquetFile(committed).read(),
        )


def bench_job() -> list[Figure]:
    """(c) the job against the plain loop and (e) its memory at 24 and at 96 series."""
    small, large = archive(24, 256, 105), archive(96, 256, 105)
    print("  plain loop over 96 series", flush=True)
    loop_s = seconds(lambda: plain_loop(large))
    print(f"  plain loop: {loop_s:.0f} s; the job at 96 and at 24 series", flush=True)
    run = run_job(large)
    job_s, at_96, at_24 = (
        run.ended - run.started,
        run.memory.peak_bytes(),
        run_job(small).memory.peak_bytes(),
    )
    return [
        Figure(
            "c",
            f"the job over the plain loop, 96 series ({loop_s:.0f} s by the loop)",
            f"{job_s / loop_s:.2f} x",
            "<= 1.15 x",
        ),
        Figure(
            "e",
            "peak memory of all processes, 96 over 24 series",
            f"{at_96 / at_24:.2f} x",
            "<= 1.1 x",
        ),
        Figure("e", "peak memory of all processes at 96 series", f"{at_96 / 1e9:.1f} GB"),
    ]


NUM_ENDURED, NUM_DISTINCT, KILL_EVERY_S = 2000, 20, 60
VICTIMS = ("_DecoderActor", "_PredictorActor", "_measure_and_store")


def bench_endurance() -> list[Figure]:
    """Two thousand small series while a worker is killed every minute: rows, and memory in both halves of the run."""
    folder = WORK / f"many-{NUM_ENDURED}"
    if not folder.exists():
        print(f"  making {NUM_ENDURED} series, {NUM_DISTINCT} of them distinct", flush=True)
        write_training_set(str(WORK / "distinct"), configs(NUM_DISTINCT, 6, 64, 14), CORES)
        distinct = sorted((WORK / "distinct" / "volumes").iterdir())
        for number in range(NUM_ENDURED):
            place = folder / f"{number // 100:02d}" / f"study-{number:04d}"
            place.mkdir(parents=True)
            os.link(distinct[number % NUM_DISTINCT], place / "ct.nii.gz")
    killed: list[str] = []

    def kill(pid: int, is_over: threading.Event) -> None:
        while not is_over.wait(KILL_EVERY_S):
            family = [
                (each, " ".join(each.cmdline()))
                for each in psutil.Process(pid).children(recursive=True)
            ]
            wanted = VICTIMS[len(killed) % len(VICTIMS)]
            for each, command in family:
                if wanted in command:
                    each.kill()
                    killed.append(wanted)
                    print(f"  killed {command}", flush=True)
                    break
            else:
                killed.append("")

    run = run_job(folder, kill)
    rows, half = run.ledger.num_rows, (run.started + run.ended) / 2
    early, late = run.memory.peak_bytes(before=half), run.memory.peak_bytes(after=half)
    screened = sum(status == "screened" for status in run.ledger["status"].to_pylist())
    keys = len(set(run.ledger["series_key"].to_pylist()))
    return [
        Figure(
            "n",
            f"rows for {NUM_ENDURED} small series, {sum(map(bool, killed))} workers killed",
            f"{rows}",
            f"{NUM_ENDURED}",
        ),
        Figure("n", "distinct series among them", f"{keys}", f"{NUM_ENDURED}"),
        Figure("n", "screened", f"{screened}", f"{NUM_ENDURED}"),
        Figure(
            "n", "peak memory, second half over first half", f"{late / early:.2f} x", "<= 1.1 x"
        ),
    ]


def bench_serving() -> list[Figure]:
    """The endpoint at one caller, at eight, and under load with hostile requests among the sound ones."""
    model, folder = model_folder(), archive(24 + 17, 256, 105)
    saved = load_model(model)
    predictor = Predictor(saved, num_threads=CORES)
    screener = Screener(
        predictor, predictor.window, for_model(ScreeningConfig(), saved.preprocessing), saved.digest
    )
    large = WORK / "large" / "ct.nii.gz"
    if not large.exists():
        large.parent.mkdir(exist_ok=True)
        (config,) = list(configs(2, 7, 512, 200))[1:]
        phantom = make_phantom(config)
        large.write_bytes(nifti.write(phantom.hu, nifti_grid(phantom)))
    sound = [path.read_bytes() for path in sorted((folder / "nifti").glob("*.nii.gz"))][:8]
    hostile = [
        b"no study",
        sound[0][:-5000],
        gzip.compress(bytes(200 << 20), 1),
        b"PK\x03\x04" + bytes(1000),
    ]
    with serving.serving(WORK / "serving", model) as endpoint:
        print("  one caller", flush=True)
        by_http, alone = serving.measure_one_caller(
            endpoint, large.read_bytes(), lambda: list(screener(str(large)))
        )
        screener.close()
        print("  eight callers", flush=True)
        bodies = sound * 12
        eight_s = serving.measure_throughput(endpoint, bodies)
        print("  load", flush=True)
        rows = serving.measure_load(endpoint, sound, hostile)
    place = WORK / "posted"
    if not place.exists():
        for index, body in enumerate(bodies):
            (place / f"{index:03d}").mkdir(parents=True)
            (place / f"{index:03d}" / "ct.nii.gz").write_bytes(body)
    print("  the job over the same studies", flush=True)
    run = run_job(place)
    job_s = run.ended - run.started
    return [
        Figure("h", f"one caller over one process, a study of {alone:.1f} s", f"{by_http / alone:.2f} x", "<= 1.15 x"),
        Figure("h", "studies a second at 8 callers over the job's", f"{job_s / eight_s:.2f} x", ">= 0.8 x"),
        *(Figure("h", *row) for row in rows),
    ]  # fmt: skip


def bench_training() -> list[Figure]:
    """Ray's training step, its data, and the feature cache; on a GPU its rate too."""
    rows = training.measure(WORK / "training", lambda text: print(f"  {text}", flush=True))
    rows += training.measure_device() if torch.cuda.is_available() else []
    return [Figure("t", *row) for row in rows]


PARTS = {
    "network": bench_network,
    "decode": bench_decode,
    "sandbox": bench_sandbox,
    "job": bench_job,
    "endurance": bench_endurance,
    "serving": bench_serving,
    "training": bench_training,
}
THEMES = {
    "screening": ("network", "decode", "job"),
    "hostile": ("sandbox",),
    "endurance": ("endurance",),
    "serving": ("serving",),
    "training": ("training",),
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--part", choices=PARTS, action="append")
    chosen = options.parse_args().part or list(PARTS)
    WORK.mkdir(exist_ok=True)
    found: dict[str, list[Figure]] = {}
    for name in chosen:
        print(f"{name} ...", flush=True)
        found[name] = PARTS[name]()
    print("\n".join(["", *table(figure for figures in found.values() for figure in figures)]))
    for theme, parts in THEMES.items():
        if set(parts) <= set(found):
            keep(theme, [figure for part in parts for figure in found[part]])
    return 0


def table(figures: Iterable[Figure]) -> list[str]:
    lines = ["| | what | measured | wanted |", "|---|---|---|---|"]
    return lines + [
        f"| {each.part} | {each.what} | {each.value} | {each.wanted} |" for each in figures
    ]


def keep(theme: str, figures: list[Figure]) -> None:
    """Write a theme's figures under benchmarks/."""
    now = datetime.now(UTC)
    hardware = f"{CORES}cpu" + ("-gpu" if torch.cuda.is_available() else "")
    target = ROOT / "benchmarks" / f"{theme}_{hardware}_{now:%Y%m}.md"
    title = f"# {theme.capitalize()}, {CORES} cores, {platform.machine()}, {now:%Y-%m}"
    target.write_text(
        "\n".join([title, "", "`make bench`; ratios within one run.", "", *table(figures), ""])
    )
    print(f"kept in {target.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
