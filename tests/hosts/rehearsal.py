"""`make rehearse`: the real playbooks on throw-away hosts of this machine.

    python -m tests.hosts.rehearsal up [--workers 2] [--images PATH] [--weights FILE] [--metrics]
                                       [--suite bookworm] [--fresh]
    python -m tests.hosts.rehearsal down

Hosts and an S3 stand-in stay up until `down`; what a crash left behind is removed by either.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil
import yaml

from pipeline.engine.java import QUICK_START
from pipeline.errors import FruitsError
from pipeline.local import seaweed
from pipeline.local.given import open_images, weights_file
from pipeline.s3.access import S3Settings
from pipeline.storage import Address, BucketStore, FolderStore, open_store
from pipeline.upload import upload
from tests.hosts import snapshots
from tests.hosts.commands import HostsError, prepare_machine, say
from tests.hosts.image import base_image
from tests.hosts.machines import Machines
from tests.waiting import eventually

REPOSITORY = Path(__file__).parents[2]
FOLDER = Path(".fruits/rehearsal")
BUCKET = "fruits"
S3_PORT = 8333  # at the machine's own address on the hosts' network, where nobody else listens
SLOTS = 1  # of a worker
_KEYS = ("s3.json", "history.json")
# What suits hosts that share this machine's two cores, its memory and its one disk.
SMALL_HOSTS: dict[str, object] = {
    "cluster_worker_cores": SLOTS,
    "cluster_worker_memory_mb": 2048,
    "cluster_driver_memory_mb": 1024,
    "cluster_smallest_disk_gb": 8,
    "cluster_spark_settings": {
        f"spark.{process}.extraJavaOptions": QUICK_START for process in ("driver", "executor")
    },
}


class Rehearsal:
    """Hosts, an S3 stand-in that they reach, and an inventory of both for the playbooks."""

    def __init__(
        self, folder: Path = FOLDER, machines: Machines | None = None, suite: str = "bookworm"
    ) -> None:
        self.folder = folder.absolute()
        self.machines = machines or Machines(
            self.folder / "hosts", tag="rehearse", subnet="10.78.0.0/24", suite=suite
        )

    def __enter__(self) -> Rehearsal:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @property
    def s3(self) -> S3Settings:
        """The stand-in, with keys that may do everything."""
        return S3Settings(**json.loads((self.folder / "s3.json").read_text()))

    @property
    def inventory(self) -> Path:
        """The inventory for `ansible-playbook -i`."""
        return self.folder / "inventory.yml"

    @property
    def secrets(self) -> Path:
        """Where the playbooks keep what they make: the password, for one."""
        return self.folder / "secrets"

    def up(self, workers: int = 2, **settings: object) -> None:
        """Boot the hosts, start the stand-in, write the inventory with the admin's settings."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        names = _names(workers)
        self.machines.up(*names, before=self._ensure_s3)
        self._write_inventory(names, settings)

    def converge(
        self,
        workers: int = 2,
        first: Callable[[Rehearsal], object] | None = None,
        **settings: object,
    ) -> None:
        """Have a configured cluster: a clone of a kept one, or a new one, which is kept.

        Parameters
        ----------
        first
            What turns fresh hosts into the cluster; the logs that it writes into the folder are
            kept, too. Without, `configure.yml`.
        """
        image = base_image(self.machines.images, self.machines.suite)
        told = {"workers": workers, "subnet": str(self.machines.network.subnet)} | settings
        snapshot = snapshots.place(self.machines.network.tag, image, told | SMALL_HOSTS)
        if not snapshot.exists():
            say("no such cluster was configured before: this one is, and kept for the next time")
            self.up(workers, **settings)
            (first or Rehearsal.configure)(self)
            self._keep(snapshot)
        say("cloning the cluster that was kept")
        self._clone(snapshot, workers, settings)

    def configure(self) -> None:
        """Turn the hosts into a cluster."""
        self.play("configure.yml")

    def _keep(self, snapshot: Path) -> None:
        """Shut the hosts down, and keep their disks with what this machine knows of them."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.machines.stop, self.machines.hosts))
        self._stop_s3()
        with snapshots.new(snapshot) as folder:
            self.machines.keep(folder / "hosts")
            for file in (*_KEYS, *(log.name for log in self.folder.glob("*.log"))):
                shutil.copy(self.folder / file, folder)
            shutil.copytree(self.secrets, folder / "secrets")

    def _clone(self, snapshot: Path, workers: int, settings: Mapping[str, object]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for file in snapshot.iterdir():
            if file.is_file():
                shutil.copy(file, self.folder)
        shutil.copytree(snapshot / "secrets", self.secrets, dirs_exist_ok=True)
        names = _names(workers)
        self.machines.clone(snapshot / "hosts", *names, before=self._ensure_s3)
        for name in names[1:]:  # a worker that came up before its master tries again after 10 s
            if not eventually(partial(self._is_known, name)):
                raise HostsError(f"the master does not know {name} after its clone")
        self._write_inventory(names, settings)

    def _is_known(self, name: str) -> bool:
        """Tell whether the master knows a worker, as the playbooks ask it."""
        ask = (
            "sudo /opt/fruits/bin/python -m pipeline.cluster.master worker "
            "/etc/fruits/spark/spark-defaults.conf http://127.0.0.1:8080 "
            f"{self.machines.hosts[name].address}"
        )
        return self.machines.run("master", ask, check=False).returncode == 0

    def down(self) -> None:
        """End all of it and remove what it wrote; base images stay."""
        try:
            self._stop_s3()
        finally:
            self.machines.down()
        subprocess.run(["rm", "-rf", "--one-file-system", str(self.folder)], check=True)

    def play(
        self,
        playbook: str,
        *arguments: str,
        inventory: Path | None = None,
        check: bool = True,
        quiet: bool = False,
        repository: Path = REPOSITORY,
    ) -> subprocess.CompletedProcess[str]:
        """Run a playbook of this project, or of a copy of it, on the hosts."""
        command = [
            str(Path(sys.executable).with_name("ansible-playbook")),
            *("-i", str(inventory or self.inventory), f"ansible/{playbook}", *arguments),
        ]
        run = subprocess.run(command, cwd=repository, text=True, capture_output=quiet, check=False)
        if check and run.returncode != 0:
            raise HostsError(f"{playbook} failed; see above. {(run.stdout or '')[-3000:]}")
        return run

    def _ensure_s3(self) -> None:
        """Have the stand-in up, with the bucket and the folder of Spark's event logs in it."""
        if not self._s3_runs():
            self._start_s3()
            BucketStore(Address(BUCKET, ""), self.s3).create_bucket()
            if self.secrets.exists():  # a clone is past the run that made the folder
                BucketStore(Address(BUCKET, "spark-events"), self.s3).write(".keep", b"")
        self.machines.open_port(S3_PORT)

    def _start_s3(self) -> None:
        home = self.folder / f"s3-{int(time.time())}"
        for name in _KEYS:
            if not (self.folder / name).exists():
                keys = seaweed.new_keys(f"http://{self.machines.gateway}:{S3_PORT}")
                seaweed.write_private(self.folder / name, json.dumps(asdict(keys)))
        s3, history = self.s3, S3Settings(**json.loads((self.folder / "history.json").read_text()))
        identities = {
            "fruits": (s3, seaweed.EVERYTHING),
            "history": (history, seaweed.READ_ONLY),
        }
        command = seaweed.command(home, s3, identities)
        with (self.folder / "s3.log").open("ab") as log:
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | seaweed.environment(),
                cwd=home,
                start_new_session=True,
            )
        (self.folder / "s3.pid").write_text(str(server.pid))
        deadline = time.monotonic() + 240
        while not seaweed.answers(s3):
            if server.poll() is not None or time.monotonic() > deadline:
                raise HostsError(f"the S3 stand-in did not start: see {self.folder}/s3.log")
            time.sleep(0.2)

    def _s3_process(self) -> psutil.Process | None:
        """Return the stand-in's process, if it is the one that was started here."""
        try:
            process = psutil.Process(int((self.folder / "s3.pid").read_text()))
            ours = str(self.folder) in " ".join(process.cmdline())
        except (OSError, ValueError, psutil.Error):
            return None
        return process if ours else None

    def _s3_runs(self) -> bool:
        return self._s3_process() is not None

    def _stop_s3(self) -> None:
        process = self._s3_process()
        if process is not None:
            process.send_signal(signal.SIGKILL)  # what it holds is thrown away with it
            process.wait(120)

    def _write_inventory(self, names: Sequence[str], settings: Mapping[str, object]) -> None:
        hosts = self.machines.hosts
        history = S3Settings(**json.loads((self.folder / "history.json").read_text()))
        entries = {f"{name}-1" if name == "master" else name: hosts[name] for name in names}
        some = hosts[names[0]]
        inventory = {
            "all": {
                "vars": {
                    "ansible_user": some.user,
                    "ansible_ssh_private_key_file": str(some.key),
                    "ansible_ssh_common_args": f"-F {some.ssh_config}",
                    "cluster_name": "rehearsal",
                    "cluster_bucket": BUCKET,
                    "cluster_secrets": str(self.secrets),
                    "cluster_s3_endpoint": self.s3.endpoint,
                    "cluster_s3_access_key": self.s3.access_key,
                    "cluster_s3_secret_key": self.s3.secret_key,
                    "cluster_s3_history_access_key": history.access_key,
                    "cluster_s3_history_secret_key": history.secret_key,
                    **SMALL_HOSTS,
                    **settings,
                },
                "children": {
                    group: {
                        "hosts": {
                            name: {"ansible_host": host.address}
                            for name, host in entries.items()
                            if (host.name == "master") == (group == "master")
                        }
                    }
                    for group in ("master", "workers")
                },
            }
        }
        self.inventory.unlink(missing_ok=True)
        seaweed.write_private(self.inventory, yaml.safe_dump(inventory, sort_keys=False))


def _names(workers: int) -> list[str]:
    return ["master", *(f"worker{number}" for number in range(1, workers + 1))]


def main() -> int:
    """Run `up` or `down`."""
    parser = argparse.ArgumentParser("python -m tests.hosts.rehearsal", description=__doc__)
    parser.add_argument("verb", choices=["up", "down"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=Path, help="images to put on S3, else some are drawn")
    parser.add_argument("--weights", type=Path, help="a Keras file of MobileNetV2, put on S3")
    parser.add_argument("--metrics", action="store_true", help="with Prometheus behind the door")
    parser.add_argument("--suite", default="bookworm", help="the Debian release of the hosts")
    parser.add_argument("--fresh", action="store_true", help="configure, whatever was kept")
    options = parser.parse_args()
    rehearsal = Rehearsal(suite=options.suite)
    try:
        if options.verb == "down":
            rehearsal.down()
            say("the rehearsal's hosts, S3 and network are gone; the base image stays for the next")
            return 0
        weights = weights_file(options.weights) if options.weights else None
        prepare_machine()
        with open_images(options.images) as (images, told):
            if options.fresh:
                rehearsal.up(options.workers, cluster_metrics=options.metrics)
                rehearsal.configure()
            else:
                rehearsal.converge(options.workers, cluster_metrics=options.metrics)
            say(f"putting images on the S3 stand-in: {told}")
            _put_on_s3(rehearsal, images, weights)
        rehearsal.play("check.yml")
    except (HostsError, FruitsError) as error:
        say(str(error))
        return 1
    _say_next_steps(rehearsal, weights)
    return 0


def _put_on_s3(rehearsal: Rehearsal, images: Path, weights: Path | None) -> None:
    source = FolderStore(Address.parse(str(images)))
    upload(source, open_store(Address(BUCKET, "images"), rehearsal.s3))
    if weights:
        BucketStore(Address(BUCKET, "weights"), rehearsal.s3).upload(weights.name, weights)


def _say_next_steps(rehearsal: Rehearsal, weights: Path | None) -> None:
    network = (
        f"--weights s3a://{BUCKET}/weights/{weights.name}"
        if weights
        else "--backbone efficientnet_lite0"
    )
    master = rehearsal.machines.hosts["master"]
    door = f"https://{master.address}:8443"
    print(
        f"""
The cluster is up. From this machine:
  JupyterLab    {door}   (it signed its own certificate: accept it)
  its password  {rehearsal.secrets}/password
  a shell       ssh -F {master.ssh_config} master
  a job, there  sudo -u analyst -i fruits run s3a://{BUCKET}/images s3a://{BUCKET}/result {network}
  playbooks     .venv/bin/ansible-playbook -i {rehearsal.inventory} ansible/check.yml
  the end       make rehearse-down"""
    )


if __name__ == "__main__":
    sys.exit(main())
