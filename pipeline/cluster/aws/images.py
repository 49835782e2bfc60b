"""Looks for the image (AMI) that each type of instance starts from."""

from __future__ import annotations

from typing import Any

from pipeline.cluster.aws.account import Account, Image
from pipeline.cluster.aws.asking import Asking


def find_images(asking: Asking, found: Account) -> None:
    """Find an image for each type already found; refuse a disk that is too small for it."""
    knobs = asking.knobs
    disk_gb = {
        knobs["master_type"]: knobs["master_disk_gb"],
        knobs["worker_type"]: knobs["worker_disk_gb"],
    }
    for name, kind in found.types.items():
        image = _newest(asking, kind.architecture)
        if image is None:
            found.add_problem(
                f"Expected an image (AMI) for {kind.architecture} in {knobs['region']}, found "
                f"none for {knobs['image'] or knobs['image_name']}; set ec2_image."
            )
            continue
        found.images[name] = image
        if disk_gb[name] < image.smallest_gb:
            found.add_problem(
                f"Expected a disk of {image.smallest_gb} GiB or more for {name}, which "
                f"{image.name} needs, found {disk_gb[name]}; set ec2_master_disk_gb and "
                "ec2_worker_disk_gb."
            )


def _newest(asking: Asking, architecture: str) -> Image | None:
    """Return the image that the admin named, else the newest one of the right name and owner."""
    knobs = asking.knobs
    wanted = {"architecture": architecture, "state": "available"}
    owners: dict[str, Any] = {}
    if knobs["image"]:
        wanted["image-id"] = knobs["image"]
    else:
        wanted["name"] = knobs["image_name"].format(
            architecture="amd64" if architecture == "x86_64" else architecture
        )
        owners = {"Owners": [knobs["image_owner"]]}
    images = asking.client("ec2").describe_images(
        Filters=[{"Name": name, "Values": [value]} for name, value in wanted.items()], **owners
    )["Images"]
    if not images:
        return None
    newest = max(images, key=lambda image: image["CreationDate"])
    disks = [mapping.get("Ebs", {}) for mapping in newest.get("BlockDeviceMappings", [])]
    return Image(
        id=newest["ImageId"],
        name=newest.get("Name", newest["ImageId"]),
        root=newest["RootDeviceName"],
        smallest_gb=max((disk.get("VolumeSize", 0) for disk in disks), default=0),
    )
