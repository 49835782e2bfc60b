"""An hour of what happens to a bucket and its result, against a model of what must be true.

Images come, go and are replaced, some are none; runs are killed at any moment, two run at once,
S3 refuses, is slow or holds requests back. Whatever happened, a run that ends well has a row for
each image listed, quarantines those that are none, and its matrix is that of a run from scratch;
one that does not says so in one line; and a reader sees one whole result at any moment.

FRUITS_SOAK_SEED repeats an hour, FRUITS_SOAK_MINUTES makes it another time.
"""

from __future__ import annotations

import csv
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline.local.loopback import Loopback
from pipeline.storage import BucketStore, open_store
from pipeline.versions import lacking, newest, open_result
from tests.corpus import encoded
from tests.s3_proxy import Behaviour, s3_proxy
from tests.waiting import SECONDS

MINUTES = float(os.environ.get("FRUITS_SOAK_MINUTES", "60"))
SEED = int(os.environ.get("FRUITS_SOAK_SEED") or random.SystemRandom().randrange(10**6))
SMALL = ("--backbone", "efficientnet_lite0", "--input-size", "96", "--components", "4")
LABELS = ("apple", "kiwi", "plum")
LONGEST_RUN = 300  # seconds

pytestmark = [pytest.mark.soak, pytest.mark.timeout(60 * MINUTES + 1800)]


class Model:
    """The images that lie in a bucket, and what must come of each."""

    def __init__(self, bucket: BucketStore, chance: random.Random) -> None:
        self.bucket, self.chance = bucket, chance
        self.images = BucketStore(bucket.address / "images", bucket.s3)
        self.output = BucketStore(bucket.address / "out", bucket.s3)
        self.good: dict[str, bool] = {}  # whether an image is one, by path
        self.number = 0

    def put(self, path: str, *, is_good: bool) -> None:
        self.number += 1
        drawn = np.random.default_rng(self.number)
        noise = drawn.normal(120, 60, (24, 24, 3)).clip(0, 255).astype(np.uint8)
        content = encoded(Image.fromarray(noise), "PNG")
        self.images.write(path, content if is_good else content[: len(content) // 2])
        self.good[path] = is_good

    def change(self) -> str:
        """Add, replace or remove images."""
        what = self.chance.choice(["add", "add", "replace", "remove", "nothing"])
        some = self.chance.sample(sorted(self.good), min(self.chance.randint(1, 8), len(self.good)))
        if what == "add":
            for _ in range(self.chance.randint(1, 25)):
                path = f"{self.chance.choice(LABELS)}/{self.number}.png"
                self.put(path, is_good=self.chance.random() < 0.9)
        elif what == "replace":
            for path in some:
                self.put(path, is_good=self.chance.random() < 0.9)
        elif what == "remove" and len(self.good) > 30:
            self.images.delete_keys(some)
            for path in some:
                del self.good[path]
        return what

    def check(self, output: BucketStore) -> np.ndarray:
        """Compare the newest result with the model; return its scores by path."""
        run, files = open_result(output, output.s3)
        assert run is not None
        good = {path for path, is_good in self.good.items() if is_good}
        counts = run.counts
        assert counts.listed == len(self.good)
        assert (counts.features, counts.quarantined) == (len(good), len(self.good) - len(good))
        content = files.read("matrix.csv")
        assert content is not None
        rows = list(csv.reader(io.StringIO(content.decode())))[1:]
        assert [row[0] for row in rows] == sorted(good)
        bad = list(csv.reader(io.StringIO((files.read("quarantine.csv") or b"").decode())))[1:]
        assert [row[0] for row in bad] == sorted(self.good.keys() - good)
        return np.array([row[2:] for row in rows], float)


class Commands:
    """`fruits run` as processes, towards S3 as it is, or as it is through a proxy."""

    def __init__(self, cluster: Loopback, model: Model, folder: Path) -> None:
        self.cluster, self.model, self.folder = cluster, model, folder

    def conf(self, endpoint: str) -> Path:
        """Return settings for one of two who share the cluster, with S3 at an endpoint."""
        place = Path(self.folder, f"conf-{len(list(self.folder.glob('conf-*')))}")
        shutil.copytree(self.cluster.conf, place)
        file = place / "spark-defaults.conf"
        text = file.read_text().replace(str(self.cluster.s3.endpoint), endpoint)
        file.write_text(f"{text}spark.cores.max 1\nspark.executor.memory 512m\n")
        return place

    def start(self, output: str, endpoint: str | None = None) -> subprocess.Popen[str]:
        address = self.model.bucket.address
        command = [str(Path(sys.executable).with_name("fruits")), "run"]
        return subprocess.Popen(
            [*command, f"{address}/images", f"{address}/{output}", *SMALL, "--allow-removals"],
            env=os.environ
            | {"SPARK_CONF_DIR": str(self.conf(endpoint or str(self.cluster.s3.endpoint)))},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def ended(running: subprocess.Popen[str]) -> bool:
    """Wait for a run; return whether it ended well, or said in one line why not."""
    _, told = running.communicate(timeout=LONGEST_RUN)
    if running.returncode:
        lines = [line for line in told.splitlines() if "fruits: " in line]
        assert running.returncode == 1, told
        assert len(lines) == 1, told
        assert "Traceback" not in told, told
    return running.returncode == 0


def kill(running: subprocess.Popen[str]) -> None:
    left = psutil.Process(running.pid).children(recursive=True)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    psutil.wait_procs(left, SECONDS)


@contextmanager
def reader(output: BucketStore, looks: Counter[str]) -> Iterator[None]:
    """Look twenty times a second whether there is one whole result."""
    over = threading.Event()
    store = open_store(output.address, output.s3)

    def look() -> None:
        seen = 0
        while not over.wait(0.05):
            run = newest(store)
            if run is None:
                assert not seen, "there was a result, and now there is none"
                continue
            assert run.version >= seen
            seen = run.version
            assert not lacking(store, run)
            looks["looks"] += 1

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            yield
        finally:
            over.set()
            looking.result()


def assert_as_from_scratch(commands: Commands, number: int) -> None:
    """Compare with a run of the same images into an empty OUTPUT."""
    model = commands.model
    fresh = f"scratch-{number}"
    assert ended(commands.start(fresh))
    scores = model.check(BucketStore(model.bucket.address / fresh, model.bucket.s3))
    grown = model.check(model.output)
    # Whatever the signs of the components, and where two of them are as large.
    np.testing.assert_allclose(grown @ grown.T, scores @ scores.T, atol=1e-4 * np.abs(scores).max())
    model.bucket.delete(fresh)


def one_run(commands: Commands, chance: random.Random, told: Counter[str]) -> None:
    """Let something happen to a run, or to two."""
    what = chance.choice(["quiet", "killed", "killed", "two", "faults", "slow"])
    told[what] += 1
    faults = {
        "faults": Behaviour(refused=0.03, hung=0.002, seed=chance.randrange(10**6)),
        "slow": Behaviour(delay=chance.uniform(0, 0.1), held=0.05, held_seconds=2.0),
        "two": Behaviour(held=0.1, held_seconds=1.5, seed=chance.randrange(10**6)),
    }
    with ExitStack() as stack:
        endpoints: list[str | None] = [None]
        if what in faults:
            s3 = str(commands.cluster.s3.endpoint)
            each = [faults[what]] * (2 if what == "two" else 1)
            endpoints = [stack.enter_context(s3_proxy(s3, one)).endpoint for one in each]
        running = [commands.start("out", endpoint) for endpoint in endpoints]
        if what == "killed":
            time.sleep(chance.uniform(0.5, 25))
            if running[0].poll() is None:
                kill(running[0])
                told["killed in fact"] += 1
            else:
                ended(running[0])
            return
        well = all_ended(running, told)
    if what == "quiet":
        assert all(well)
    if any(well):  # of two, each takes all that lies there
        commands.model.check(commands.model.output)


def test_of_two_runs_at_once_each_ends_well_or_says_why_not_twenty_times(
    cluster: Loopback, bucket: BucketStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance, told = random.Random(SEED), Counter[str]()
    model = Model(bucket, chance)
    commands = Commands(cluster, model, tmp_path)
    for number in range(40):
        model.put(f"{LABELS[number % 3]}/{number}.png", is_good=number % 10 != 0)
    with reader(model.output, told):
        for _ in range(20):
            two_runs(commands, chance, told)
            model.change()
    with capsys.disabled():
        print(f"\nseed {SEED}: {dict(told)}")
    assert told["ended well"] + told["said why not"] == 40
    assert told["ended well"] >= 20


def two_runs(commands: Commands, chance: random.Random, told: Counter[str]) -> None:
    """Start two runs, each behind a proxy that holds requests back as it likes."""
    s3 = str(commands.cluster.s3.endpoint)
    with ExitStack() as stack:
        running = []
        for _ in range(2):
            held = Behaviour(held=0.1, held_seconds=1.5, seed=chance.randrange(10**6))
            endpoint = stack.enter_context(s3_proxy(s3, held)).endpoint
            running.append(commands.start("out", endpoint))
        well = all_ended(running, told)
    assert any(well), "one of them was the first"
    commands.model.check(commands.model.output)


def all_ended(running: list[subprocess.Popen[str]], told: Counter[str]) -> list[bool]:
    """Wait for runs, and count how they ended."""
    well = [ended(one) for one in running]
    told["ended well"] += sum(well)
    told["said why not"] += len(well) - sum(well)
    return well


def test_whatever_happens_the_result_is_right_or_the_run_says_why_not(
    cluster: Loopback, bucket: BucketStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(SEED)
    model = Model(bucket, chance)
    commands = Commands(cluster, model, tmp_path)
    for number in range(40):
        model.put(f"{LABELS[number % 3]}/{number}.png", is_good=number % 10 != 0)
    told: Counter[str] = Counter()
    end, rounds = time.monotonic() + 60 * MINUTES, 0
    try:
        with reader(model.output, told):
            assert ended(commands.start("out"))
            while time.monotonic() < end:
                told[model.change()] += 1
                one_run(commands, chance, told)
                rounds += 1
                if rounds % 8 == 0:
                    assert ended(commands.start("out"))
                    assert_as_from_scratch(commands, rounds)
                    told["as from scratch"] += 1
            assert ended(commands.start("out"))
            assert_as_from_scratch(commands, rounds)
            told["as from scratch"] += 1
    finally:
        counts = ", ".join(f"{name} {number:,}" for name, number in told.items())
        with capsys.disabled():
            print(f"\nseed {SEED}, {rounds} rounds: {counts}; {len(model.good)} images at the end")
    found = newest(model.output)
    assert found is not None
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{6}", found.folder)
