"""manifest.json: what a folder must hold, by name, size and sha256, and whether it does.

Its bytes are the one encoding of what it says, the sha256 of its own remainder included: every flipped bit
shows, even in white space. Nothing it does not name is ever read.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, field
from io import FileIO
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bertpair.errors import CheckpointError, list_faults, show

MANIFEST_NAME = "manifest.json"
FORMAT = 1
MAX_MANIFEST_BYTES = 4 << 20
_CHANGED = "its contents have changed: their sha256 is not the manifest's"


def is_plain_name(name: str) -> bool:
    """True for a name that cannot leave its folder: no separator, drive, NUL, `.`, `..`, and not empty."""
    return name not in ("", ".", "..") and not any(character in name for character in "/\\:\0")


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError(f"{show(name)} is not a plain file name")
    return name


@dataclass(frozen=True, config={"extra": "forbid"})
class FileEntry:
    """One file of a folder."""

    name: Annotated[str, AfterValidator(_plain)]
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _named_once(files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
    folded = {entry.name.casefold() for entry in files} | {MANIFEST_NAME}
    if len(folded) != len(files) + 1:
        raise ValueError("a file is named twice")
    return files


@dataclass(frozen=True, config={"extra": "forbid"})
class Manifest:
    """What a whole folder holds, which versions wrote it, and the writer's own notes (`meta`)."""

    files: Annotated[tuple[FileEntry, ...], AfterValidator(_named_once)]
    versions: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def entry(self, name: str) -> FileEntry:
        """The entry of a file; CheckpointError if the manifest does not name it."""
        entries = {entry.name: entry for entry in self.files}
        if name in entries:
            return entries[name]
        names = ", ".join(entries) or "nothing"
        raise CheckpointError(f"{name}: not named in {MANIFEST_NAME}, which names {names}")

    @property
    def run_id(self) -> str | None:
        """Which run wrote the folder, where `meta` says so."""
        run_id = self.meta.get("run_id")
        return run_id if isinstance(run_id, str) else None


_MANIFEST = TypeAdapter(Manifest)


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes of manifest.json: equal manifests give equal bytes. ValueError if too large."""
    said = {"format": FORMAT, **asdict(manifest)}
    said["files"] = sorted(said["files"], key=lambda entry: entry["name"])
    style: dict[str, Any] = {"sort_keys": True, "ensure_ascii": False, "allow_nan": False}
    compact = json.dumps(said, separators=(",", ":"), **style)
    said["sha256"] = hashlib.sha256(compact.encode("utf-8")).hexdigest()
    data = json.dumps(said, indent=1, **style).encode("utf-8") + b"\n"
    if len(data) > MAX_MANIFEST_BYTES:
        raise ValueError(f"a manifest of {len(data)} bytes; {MAX_MANIFEST_BYTES} are allowed")
    return data


def parse_manifest(data: bytes) -> Manifest:
    """Read manifest.json; CheckpointError says what is wrong with it (the caller says which file it is)."""
    try:
        said = json.loads(data)
        if not isinstance(said, dict) or "format" not in said:
            raise CheckpointError("not a manifest of bertpair's")
        if (stated := said.pop("format")) != FORMAT:
            raise CheckpointError(f"format {show(stated)} is unknown; this program reads format {FORMAT}")
        said.pop("sha256", None)
        manifest = _MANIFEST.validate_python(said)
        if encode_manifest(manifest) != data:  # its sha256 included
            raise CheckpointError("damaged: these are not the bytes that bertpair wrote")
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise CheckpointError(f"damaged: {place}: {fault['msg']}; found {show(fault['input'])}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"damaged: {str(error) or type(error).__name__}") from error
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """manifest.json of a folder, itself verified; the files it names are not looked at."""
    path = folder / MANIFEST_NAME
    with _opened(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes; no manifest is")
        data = file.readall()
    try:
        return parse_manifest(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def verify_folder(folder: Path) -> Manifest:
    """The manifest of a whole folder; CheckpointError names each file that is not as the manifest says.

    Sizes are compared before anything is hashed. Files that the manifest does not name are passed over.
    """
    manifest = read_manifest(folder)
    for is_hashed in (False, True):
        faults = []
        for entry in manifest.files:
            try:
                with _opened(folder / entry.name, entry) as file:
                    if is_hashed and hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                        raise CheckpointError(f"{file.name}: {_CHANGED}")
            except CheckpointError as error:
                faults.append(str(error))
        if faults:
            raise CheckpointError(list_faults(faults))
    return manifest


def read_verified(folder: Path, name: str, manifest: Manifest | None = None) -> bytes:
    """The bytes of a file, which are what the manifest (read here unless given) says; or CheckpointError."""
    entry = (manifest or read_manifest(folder)).entry(name)
    with _opened(folder / name, entry) as file:  # which compares the size before memory is taken for it
        data = file.readall()
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise CheckpointError(f"{folder / name}: {_CHANGED}")
    return data


@contextmanager
def _opened(path: Path, entry: FileEntry | None = None) -> Iterator[FileIO]:
    """A plain file, of the size that its entry says; anything else, or any trouble, is a CheckpointError."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: a symbolic link, folder or device; only plain files are read")
        if entry is not None and status.st_size != entry.size:
            raise CheckpointError(f"{path}: {status.st_size} bytes; the manifest says {entry.size}")
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
