"""The disk that every host starts from: Debian as its EC2 images have it, built once and kept.

An image is a folder named by the hash of all that goes into it, so that a change of the recipe, of
this machine's certificates or of its apt sources gives a new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from tests.hosts.commands import call, say
from tests.hosts.registries import CERTIFICATES, apt_settings, apt_sources

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fruits"
IMAGES = CACHE / "base-images"  # of all checkouts

LOGIN = "admin"  # as on Debian's EC2 images
LOGIN_ID = 1000
PACKAGES = (
    "systemd-sysv", "dbus", "libpam-systemd", "openssh-server", "sudo", "python3", "python3-apt",
    "ca-certificates", "iproute2", "procps", "locales", "less", "iputils-ping",
)  # fmt: skip

# What has no hardware or no use in a container, and timers that would hold apt's lock while a
# playbook wants it. The address is set from outside.
_MASKED = (
    "console-getty.service", "getty.target", "networking.service", "systemd-networkd.service",
    "systemd-timesyncd.service", "systemd-firstboot.service", "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount", "apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer",
    "fstrim.timer",
)  # fmt: skip

_RECIPE = f"""
set -eu
root=$1
mkdir -p "$root{CERTIFICATES}"
[ ! -d {CERTIFICATES} ] || cp -r {CERTIFICATES}/. "$root{CERTIFICATES}/"
chroot "$root" update-ca-certificates
chroot "$root" useradd --create-home --uid {LOGIN_ID} --shell /bin/bash --groups adm,sudo {LOGIN}
echo '{LOGIN} ALL=(ALL) NOPASSWD:ALL' >"$root/etc/sudoers.d/90-{LOGIN}"
chmod 440 "$root/etc/sudoers.d/90-{LOGIN}"
printf '%s no\\n' PasswordAuthentication PermitRootLogin >"$root/etc/ssh/sshd_config.d/50-keys.conf"
echo 'LANG=C.UTF-8' >"$root/etc/default/locale"
for unit in {" ".join(_MASKED)}; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
rm -f "$root"/etc/ssh/ssh_host_* "$root/var/lib/dbus/machine-id" "$root/etc/hostname"
: >"$root/etc/machine-id"
rm -f "$root/var/lib/apt/periodic/update-success-stamp"
"""


def base_image(folder: Path, suite: str) -> Path:
    """Return the image of `suite` below `folder`; build it if this is the first time.

    Several may ask at once: one builds, the others wait for it.
    """
    sources, options = apt_sources(suite), _apt_options()
    image = folder.absolute() / _name(suite, sources, options)
    if image.exists():
        return image
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob("*.part"):
            shutil.rmtree(left, ignore_errors=True)
        if not image.exists():
            _build(image, suite, sources, options)
    return image


def remove_images(folder: Path) -> None:
    """Remove every base image below `folder`."""
    for image in [*folder.glob("*-????????????"), *folder.glob("*.part")]:
        shutil.rmtree(image)
    (folder / ".lock").unlink(missing_ok=True)
    with suppress(OSError):  # it is not there, or holds something else
        folder.rmdir()


def _apt_options() -> list[str]:
    # apt would follow a site's SRV record to addresses that nobody opened the way to.
    return [*apt_settings(), 'Acquire::EnableSrvRecords "false";']


def _name(suite: str, sources: list[str], options: list[str]) -> str:
    certificates = [file.read_text() for file in sorted(CERTIFICATES.glob("**/*.crt"))]
    spec = json.dumps([suite, PACKAGES, _RECIPE, certificates, sources, options])
    return f"{suite}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}"


def _build(image: Path, suite: str, sources: list[str], options: list[str]) -> None:
    say(f"building the base image {image.name}, once (some 40 s) ...")
    begin = time.monotonic()
    part = image.with_name(f"{image.name}.part")
    call(
        # In a mount namespace, so that a build that is killed leaves no mount on the machine.
        *("unshare", "--mount", "--propagation", "private"),
        *("mmdebstrap", "--quiet", "--mode=root", "--variant=important", "--format=directory"),
        f"--include={','.join(PACKAGES)}",
        *(f"--aptopt={option}" for option in options),
        f"--customize-hook={_RECIPE}",
        *(suite, part, *sources),
    )
    # Ansible takes the lists' age from their folder: it must not look fresh while it is empty.
    os.utime(part / "var/lib/apt/lists", (946684800, 946684800))
    part.rename(image)
    say(f"built it in {time.monotonic() - begin:.0f} s")
