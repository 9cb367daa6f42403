"""The packages with the pictograms: fetched by npm, checked against their digest, unpacked, listed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from wgates_plugin.errors import ConfigError, FileFormatError
from wgates_plugin.files import read_json

VERSION = "16.0.0"
SHA512 = {
    "twitter": "ec5fae0ae1c7fbb427adcd793f9b676ef2a483d13ab65ce2e0c9d3dae5b5465378a4b613cdae9c3ff"
    "76cb487d20ccb698c52d6b997b05a0f2305bb8bd9ec842d",
    "google": "6517b17f3b3b315a0b9e6cd998db0ee132a19c0269e43fbe566e8fa54a47fe31104257a6a7797cf028"
    "d9f83a19d9f68cf51e10c5990e3c90a84fc0e53e17d0dc",
}
"""Vendor of the drawings -> digest of its archive. Drawings: CC-BY-4.0 (twitter), Apache-2.0 (google)."""

LARGEST_FILE = 4 << 20
LARGEST_PACKAGE = 64 << 20
"""Bytes unpacked: emoji.json has 1.3 MB, one vendor's images of 64 px have 10 MB."""

NOT_A_PICTOGRAM = "Component"
"""The category of the five skin tones, which are swatches."""

COMMAND = "python -m benchmarks.tasks.emoji --fetch"


@dataclass(frozen=True)
class Drawing:
    """One vendor's image of one emoji. `code` is its `unified` code, the same for all vendors."""

    code: str
    category: str
    path: Path


def package(vendor: str) -> str:
    return f"emoji-datasource-{vendor}"


def fetch(folder: Path) -> None:
    """Have both packages unpacked under `folder`; what is there stays.

    An archive of `npm pack` that lies in `folder` already is taken, so that it can be brought there
    by other means.

    Raises:
        ConfigError: npm is missing or fails. FileFormatError: an archive is not the known one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for vendor in SHA512:
        if (folder / package(vendor)).is_dir():
            continue
        archive = f"{package(vendor)}-{VERSION}.tgz"
        if (folder / archive).is_file():
            check(folder / archive, vendor)
            unpack(folder / archive, vendor, folder)
            continue
        with tempfile.TemporaryDirectory(dir=folder) as place:
            _npm_pack(vendor, Path(place), folder / archive)
            check(Path(place) / archive, vendor)
            unpack(Path(place) / archive, vendor, folder)


def _npm_pack(vendor: str, place: Path, other: Path) -> None:
    name = f"{package(vendor)}@{VERSION}"
    by_hand = f"or put the archive of `npm pack {name}`, made elsewhere, at `{other}`"
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError("npm", [f"is not installed; install Node.js and call again, {by_hand}"])
    command = [npm, "pack", name, "--silent", "--ignore-scripts", "--pack-destination", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = ["", *done.stderr.strip().splitlines()][-1][:200]
        raise ConfigError(
            f"`npm pack {name}`",
            [f"failed ({last}); check the network and npm's registry and call again, {by_hand}"],
        )


def check(archive: Path, vendor: str) -> None:
    """Raises:
    FileFormatError: the archive is not byte for byte the known one.
    """
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha512").hexdigest()
    if found != SHA512[vendor]:
        raise FileFormatError(
            f"archive `{archive}`: sha512 {found[:16]}... instead of {SHA512[vendor][:16]}...; it "
            f"is cut off or another version than {VERSION}: delete it and call `{COMMAND}` again"
        )


def unpack(archive: Path, vendor: str, folder: Path) -> Path:
    """Write emoji.json, the licence and the images of 64 px to `folder`/PACKAGE; returns that.

    Only plain files with exactly these names are written: a name that leads elsewhere, a link or
    anything else in the archive is passed over. The folder appears when all is written.

    Raises:
        FileFormatError: no readable archive, a file of unlikely size, or no pictograms in it.
    """
    image = rf"img/{re.escape(vendor)}/64/[0-9a-f-]+\.png"
    wanted = re.compile(rf"package/(emoji\.json|package\.json|LICENSE|{image})")
    home = folder / package(vendor)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        target = Path(place) / "whole"
        total = 0
        try:
            with tarfile.open(archive, "r:gz") as tar:
                for member in tar:
                    named = wanted.fullmatch(member.name)
                    if named is None or not member.isfile():
                        continue
                    total += member.size
                    if member.size > LARGEST_FILE or total > LARGEST_PACKAGE:
                        raise FileFormatError(
                            f"archive `{archive}`: `{member.name}` brings it to {total} bytes, "
                            "more than the real one has; delete it and fetch it again"
                        )
                    file = tar.extractfile(member)
                    assert file is not None
                    path = target / named.group(1)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(file.read())
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise FileFormatError(
                f"archive `{archive}`: cannot be unpacked ({error}); delete it and fetch it again"
            ) from error
        if not (target / "emoji.json").is_file() or not (target / "img" / vendor / "64").is_dir():
            raise FileFormatError(
                f"archive `{archive}`: no emoji.json or no images of 64 px; is it {package(vendor)}?"
            )
        os.replace(target, home)
    return home


def drawings(folder: Path, vendor: str) -> list[Drawing]:
    """One vendor's pictograms under `folder`, in the order of emoji.json; skin tones left out.

    Raises:
        ConfigError: the package is not there. FileFormatError: its list or an image is damaged.
    """
    home = folder / package(vendor)
    if not (home / "emoji.json").is_file():
        raise ConfigError(
            "data emoji",
            [f"no pictograms at `{home}`; fetch them with: {COMMAND} {folder}"],
        )
    listed = read_json(home / "emoji.json", kind="list of emoji")
    try:
        found = [
            Drawing(
                str(entry["unified"]),
                str(entry["category"]),
                home / "img" / vendor / "64" / Path(entry["image"]).name,
            )
            for entry in listed
            if entry[f"has_img_{vendor}"] and entry["category"] != NOT_A_PICTOGRAM
        ]
    except (KeyError, TypeError) as error:
        raise FileFormatError(
            f"list of emoji `{home / 'emoji.json'}`: no list of emoji ({error!r}); delete `{home}` "
            f"and fetch it again: {COMMAND} {folder}"
        ) from error
    lost = [drawing.path.name for drawing in found if not drawing.path.is_file()]
    if lost:
        raise FileFormatError(
            f"pictograms `{home}`: {len(lost)} images are missing, first `{lost[0]}`; delete the "
            f"folder and fetch it again: {COMMAND} {folder}"
        )
    return found
