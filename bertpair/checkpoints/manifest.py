"""manifest.json: what a folder must hold, by name, size and sha256, and whether it does.

The file is canonical: its bytes are the one encoding of what it says, and it carries the sha256 of its
own remainder. So every flipped bit shows, even in white space. Nothing it does not name is ever read.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from bertpair.errors import CheckpointError, list_faults

MANIFEST_NAME = "manifest.json"
FORMAT = 1
MAX_MANIFEST_BYTES = 4 << 20
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file of a folder."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a whole folder holds, which versions wrote it, and the writer's own notes (`meta`)."""

    files: tuple[FileEntry, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def entry(self, name: str) -> FileEntry:
        """The entry of a file; CheckpointError if the manifest does not name it."""
        for entry in self.files:
            if entry.name == name:
                return entry
        names = ", ".join(entry.name for entry in self.files)
        raise CheckpointError(f"{name}: not named in {MANIFEST_NAME}, which names {names or 'nothing'}")

    @property
    def run_id(self) -> str | None:
        """Which run wrote the folder, where `meta` says so."""
        run_id = self.meta.get("run_id")
        return run_id if isinstance(run_id, str) else None


def is_plain_name(name: str) -> bool:
    """True for a name that cannot leave its folder: no separator, drive, NUL, `.`, `..`, and not empty."""
    return name not in ("", ".", "..") and not any(character in name for character in "/\\:\0")


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes of manifest.json: equal manifests give equal bytes. ValueError if too large."""
    files = sorted(manifest.files, key=lambda entry: entry.name)
    rest = {
        "format": FORMAT,
        "files": [{"name": e.name, "size": e.size, "sha256": e.sha256} for e in files],
        "versions": dict(manifest.versions),
        "meta": dict(manifest.meta),
    }
    data = _encode({**rest, "sha256": _digest(rest)})
    if len(data) > MAX_MANIFEST_BYTES:
        raise ValueError(f"a manifest of {len(data)} bytes; {MAX_MANIFEST_BYTES} are allowed")
    return data


def _encode(value: object) -> bytes:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def _digest(rest: object) -> str:
    compact = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(compact.encode("utf-8")).hexdigest()


def parse_manifest(data: bytes) -> Manifest:
    """Read manifest.json; CheckpointError says what is wrong with it (the caller says which file it is)."""
    try:
        manifest = _unsealed(json.loads(data))
        canonical = encode_manifest(manifest) == data
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"damaged: {str(error) or type(error).__name__}") from error
    if not canonical:
        raise CheckpointError("damaged: not written the way bertpair writes it")
    return manifest


def _unsealed(parsed: object) -> Manifest:
    if not isinstance(parsed, dict) or "format" not in parsed:
        raise CheckpointError("not a manifest of bertpair's")
    if parsed.get("sha256") != _digest({key: value for key, value in parsed.items() if key != "sha256"}):
        raise CheckpointError("damaged: it does not have the sha256 that it states")
    if type(parsed["format"]) is not int or parsed["format"] != FORMAT:
        raise CheckpointError(f"format {parsed['format']!r} is unknown; this program reads format {FORMAT}")
    return _checked_manifest(parsed)


def _checked_manifest(parsed: dict[str, Any]) -> Manifest:
    files, versions, meta = (parsed.get(key) for key in ("files", "versions", "meta"))
    if set(parsed) != {"format", "files", "versions", "meta", "sha256"} or not isinstance(files, list):
        raise CheckpointError("its fields must be files, format, meta, sha256 and versions")
    if not isinstance(meta, dict) or not isinstance(versions, dict):
        raise CheckpointError("meta and versions must be objects")
    if not all(isinstance(version, str) for version in versions.values()):
        raise CheckpointError("versions must be strings")
    entries = tuple(_checked_entry(item) for item in files)
    folded = {entry.name.casefold() for entry in entries} | {MANIFEST_NAME}
    if len(folded) != len(entries) + 1:
        raise CheckpointError("a file is named twice")
    return Manifest(entries, versions, meta)


def _checked_entry(item: object) -> FileEntry:
    if not isinstance(item, dict) or set(item) != {"name", "size", "sha256"}:
        raise CheckpointError("each file must have a name, a size and a sha256")
    name, size, sha256 = item["name"], item["size"], item["sha256"]
    if not isinstance(name, str) or not is_plain_name(name):
        raise CheckpointError(f"{name!r} is not a plain file name")
    if type(size) is not int or size < 0:
        raise CheckpointError(f"{name}: size {size!r} is not a number of bytes")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise CheckpointError(f"{name}: sha256 must be 64 hexadecimal digits")
    return FileEntry(name, size, sha256)


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

    Sizes are compared before anything is hashed. Files that the manifest does not name are passed over: they
    are never loaded.
    """
    manifest = read_manifest(folder)
    faults = [fault for entry in manifest.files if (fault := _size_fault(folder, entry))]
    if not faults:
        faults = [fault for entry in manifest.files if (fault := file_fault(folder, entry))]
    if faults:
        raise CheckpointError(list_faults(faults))
    return manifest


def extra_files(folder: Path, manifest: Manifest) -> list[str]:
    """The names of visible files and folders in `folder` that its manifest does not name."""
    known = {entry.name for entry in manifest.files} | {MANIFEST_NAME}
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}") from error
    return [name for name in names if name not in known and name[0] != "."]


def _size_fault(folder: Path, entry: FileEntry) -> str | None:
    path = folder / entry.name
    try:
        status = os.lstat(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return f"{path}: a symbolic link, folder or device; only plain files are read"
    if status.st_size != entry.size:
        return f"{path}: {status.st_size} bytes; the manifest says {entry.size}"
    return None


def file_fault(folder: Path, entry: FileEntry) -> str | None:
    """What is wrong with a file, contents included, or None."""
    if fault := _size_fault(folder, entry):
        return fault
    try:
        with _opened(folder / entry.name) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except CheckpointError as error:
        return str(error)
    return None if digest == entry.sha256 else _content_fault(folder / entry.name)


def read_verified(folder: Path, name: str, manifest: Manifest | None = None) -> bytearray:
    """The bytes of a file, which are what the manifest (read here unless given) says; or CheckpointError."""
    entry = (manifest or read_manifest(folder)).entry(name)
    path = folder / name
    if fault := _size_fault(folder, entry):  # before a buffer of the stated size is made
        raise CheckpointError(fault)
    data = bytearray(entry.size)
    view, filled = memoryview(data), 0
    with _opened(path) as file:
        while filled < entry.size and (count := file.readinto(view[filled:])):
            filled += count
    if filled != entry.size or hashlib.sha256(view).hexdigest() != entry.sha256:
        raise CheckpointError(_content_fault(path))
    return data


def _content_fault(path: Path) -> str:
    return f"{path}: its contents have changed: their sha256 is not the manifest's"


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """A plain file of a folder of ours, unbuffered; anything else, or any trouble, is a CheckpointError."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise CheckpointError(f"{path}: a symbolic link, folder or device; only plain files are read")
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
