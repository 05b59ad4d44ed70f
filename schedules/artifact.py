"""Saved executables: one file that runs where no compiler is.

The file is an uncompressed zip archive:

    manifest.json           format version, signature, versions, SHA-256 of every other member
    code/program.so         machine code (or code/*.o where there was no linker)
    constants.bin           constant tensors, if any: in the signature's order, each at a multiple of 64 bytes
    tensors.safetensors     values for inputs that the caller keeps bound (parameters, state), if any
    phase0/code/...         the same of each phase, of a program whose shapes depend on data (`phased.py`)

The archive's comment holds the SHA-256 of the manifest, so every byte that matters is covered. Nothing
is unpickled and nothing is unpacked to a path named by the archive. (Checksums find damage, not malice: a saved
program is machine code, so load it only from where you would run a program from.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import secrets
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.errors import ArtifactError, TreadleError
from .abi import ALIGNMENT, numpy_dtype
from .executable import Executable, empty_aligned
from .link import Library
from .signature import Signature, TensorInfo

log = logging.getLogger("treadle.artifact")

FORMAT = 3
_SINGLE = 2  # the format of a program without phases
_MANIFEST, _CONSTANTS, _CODE = "manifest.json", "constants.bin", "code/"
_TENSORS = "tensors.safetensors"
_FORMAT_1_CONSTANTS = "constants.safetensors"
_COMMENT = "treadle "
_LIMIT = 64 << 20  # of the manifest


def save(executable: Executable, path: Any, tensors: dict[str, np.ndarray] | None = None) -> None:
    """Write an executable to `path`, atomically: either the whole file is there or what was there before.

    `tensors` (input name -> value) are what the caller binds to inputs; `load` gives them back as `.tensors`.

    Raises:
        ArtifactError: the file cannot be written.
    """
    path = Path(path)
    members, described = _taken_apart(executable)
    if tensors:
        members[_TENSORS] = write_tensors(tensors)
    manifest = {
        **described,
        "format": FORMAT if "phases" in described else _SINGLE,
        "tensors": sorted(tensors or ()),
        "versions": _versions(),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in members.items()},
    }
    try:
        members = {_MANIFEST: json.dumps(manifest, indent=1, sort_keys=True).encode(), **members}
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the program's metadata cannot be saved as JSON: {error}") from error
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    try:
        try:
            with open(temporary, "wb") as file:
                with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                    for name, data in members.items():
                        archive.writestr(zipfile.ZipInfo(name), data)
                    archive.comment = (_COMMENT + hashlib.sha256(members[_MANIFEST]).hexdigest()).encode()
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error


def _taken_apart(executable: Any) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The members of the archive that hold an executable, and what the manifest says of it."""
    described = {"signature": executable.signature.to_json(),
                 "constant_bytes": sum(c.nbytes for c in executable.constants.values())}
    if hasattr(executable, "parts"):
        parts = [_taken_apart(part) for part in executable.parts]
        members = {f"phase{k}/{name}": data for k, (found, _) in enumerate(parts) for name, data in found.items()}
        return members, {**described, "phases": {"plan": executable.plan, "parts": [d for _, d in parts]}}
    members = {_CODE + name: data for name, data in executable.library.files.items()}
    if executable.constants:
        members[_CONSTANTS] = _write_constants(executable.constants, executable.signature.constants)
    return members, described


def load(path: Any) -> Executable:
    """The executable in a file written by `save`. Neither traces nor compiles; needs no compiler.

    Raises:
        ArtifactError: no such file, not a saved program, damaged, or written by a newer version.
        TargetError: this machine cannot execute its code.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    except TreadleError:
        raise
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, IndexError, AttributeError, EOFError,
            NotImplementedError, RuntimeError) as error:  # fmt: skip
        raise ArtifactError(f"{path} is damaged or no saved program: {error}") from error


def _read(archive: zipfile.ZipFile, path: Path) -> Executable:
    names = [info.filename for info in archive.infolist()]
    if (
        len(set(names)) != len(names)
        or _MANIFEST not in names
        or archive.getinfo(_MANIFEST).file_size > _LIMIT
    ):
        raise ArtifactError(f"{path} is no saved program: it has no proper {_MANIFEST}")
    text = archive.read(_MANIFEST)
    if archive.comment.decode("ascii", "replace") != _COMMENT + hashlib.sha256(text).hexdigest():
        raise ArtifactError(
            f"{path} is damaged: the checksum of {_MANIFEST} does not match; save the program again"
        )
    manifest = json.loads(text)
    if manifest["format"] > FORMAT:
        raise ArtifactError(
            f"{path} has format {manifest['format']}, this version reads up to {FORMAT} (it was written by "
            f"treadle {manifest['versions'].get('treadle')}): install a newer treadle"
        )
    members, hashes = {}, manifest["sha256"]
    for name in hashes:
        _check_name(name, path)
        if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise ArtifactError(f"{path} is damaged: member {name!r} is compressed")
        members[name] = _contents(archive, name, path)
        if name != _CONSTANTS:
            _check_hash(name, members[name], hashes, path)
    # The hash of many constants takes longer than all else: another thread computes it meanwhile.
    failed: list[ArtifactError] = []
    hashing = threading.Thread(target=_collect, args=(failed, _CONSTANTS, members.get(_CONSTANTS, b""), hashes, path))
    hashing.start()
    try:
        executable = _executable(manifest, members)
    finally:
        hashing.join()
    if failed:
        raise failed[0]
    log.info("%s: %s, written by %s", path, executable.signature.name, manifest["versions"])
    return executable


def _check_hash(name: str, data: Any, hashes: dict[str, str], path: Path) -> None:
    if name in hashes and hashlib.sha256(data).hexdigest() != hashes[name]:
        raise ArtifactError(f"{path} is damaged: the checksum of {name} does not match; save the program again")


def _collect(failed: list[ArtifactError], *check: Any) -> None:
    try:
        _check_hash(*check)
    except ArtifactError as error:
        failed.append(error)


def _contents(archive: zipfile.ZipFile, name: str, path: Path) -> memoryview:
    """The bytes of a stored member, on an aligned place; `zipfile` itself would copy them, and check them by a CRC."""
    info, file = archive.getinfo(name), archive.fp
    assert file is not None
    file.seek(info.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\3\4" or info.file_size > os.fstat(file.fileno()).st_size:
        raise ArtifactError(f"{path} is damaged: no member {name!r}")
    file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), os.SEEK_CUR)
    data = memoryview(empty_aligned((info.file_size,), np.uint8))  # type: ignore[arg-type]
    if info.file_size and file.readinto(data) != info.file_size:  # type: ignore[attr-defined]
        raise ArtifactError(f"{path} is damaged: member {name!r} is cut off")
    return data


def _executable(manifest: dict[str, Any], members: dict[str, memoryview]) -> Executable:
    signature = Signature.from_json(manifest["signature"])
    if "phases" in manifest:
        return _phased(signature, manifest, members)
    code = {name[len(_CODE) :]: bytes(data) for name, data in members.items() if name.startswith(_CODE)}
    if _FORMAT_1_CONSTANTS in members:
        values = read_tensors(bytes(members[_FORMAT_1_CONSTANTS]), signature.constants)
    else:
        values = _read_constants(members.get(_CONSTANTS), signature.constants, manifest["constant_bytes"])
    bound = [info for info in signature.inputs if info.name in manifest.get("tensors", ())]
    executable = Executable(signature, Library(code), values, own_constants=True)
    executable.prepare()
    tensors = members.get(_TENSORS)
    executable.tensors = read_tensors(None if tensors is None else bytes(tensors), bound)
    return executable


def _phased(signature: Signature, manifest: dict[str, Any], members: dict[str, memoryview]) -> Any:
    from .phased import Phased  # few programs have phases

    parts = []
    for k, described in enumerate(manifest["phases"]["parts"]):
        prefix = f"phase{k}/"
        own = {name[len(prefix):]: data for name, data in members.items() if name.startswith(prefix)}
        parts.append(_executable(described, own))
    executable = Phased(signature, parts, manifest["phases"]["plan"])
    bound = [info for info in signature.inputs if info.name in manifest["tensors"]]
    executable.tensors = read_tensors(bytes(members[_TENSORS]) if _TENSORS in members else None, bound)
    return executable


def _check_name(name: str, path: Path) -> None:
    """Members are looked up by these names only, and never become paths; still, nothing odd gets further."""
    phase, _, rest = name.partition("/")
    if phase.startswith("phase") and phase[5:].isdecimal():
        name = rest
    base = name[len(_CODE) :] if name.startswith(_CODE) else ""
    if name not in (_CONSTANTS, _FORMAT_1_CONSTANTS, _TENSORS) and not (
        base.endswith((".so", ".o")) and base.replace("_", "").replace(".", "").isalnum()
    ):
        raise ArtifactError(f"{path} is no saved program: it names a member {name!r}")


def _write_constants(constants: dict[str, np.ndarray], infos: Sequence[TensorInfo]) -> bytes:
    parts = []
    for info in infos:
        data = np.ascontiguousarray(constants[info.name]).tobytes()
        parts.append(data + bytes(-len(data) % ALIGNMENT))
    return b"".join(parts)


def _read_constants(data: memoryview | None, infos: Sequence[TensorInfo], nbytes: int) -> dict[str, np.ndarray]:
    """What `_write_constants` wrote, where it lies: `nbytes` without what stands between."""
    found, first = {}, 0
    for info in infos if data is not None else ():
        dtype = numpy_dtype(info.dtype)
        count = math.prod(info.shape)
        found[info.name] = np.frombuffer(data, dtype, count, first).reshape(info.shape)  # type: ignore[arg-type]
        first += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    if data is not None and (first != len(data) or sum(a.nbytes for a in found.values()) != nbytes):
        raise ArtifactError("the saved constants are not those of the program")
    return found


def write_tensors(constants: dict[str, np.ndarray]) -> bytes:
    """As safetensors. What NumPy itself has no dtype for (bfloat16, int4...) is stored as its bytes in memory."""
    from safetensors.numpy import save as serialize

    flat = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in constants.items()}
    return serialize(
        {
            name: array if array.dtype.isbuiltin == 1 else array.reshape(-1).view(np.uint8)
            for name, array in flat.items()
        }
    )


def read_tensors(data: bytes | None, infos: list[TensorInfo]) -> dict[str, np.ndarray]:
    """The tensors that `write_tensors` wrote, of the types that `infos` give.

    Raises:
        ArtifactError: the data are damaged.
    """
    if data is None:
        return {}
    import safetensors
    from safetensors.numpy import load as deserialize

    try:
        stored = deserialize(data)
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"the saved constants are damaged: {error}") from error
    return {
        info.name: stored[info.name].reshape(-1).view(numpy_dtype(info.dtype)).reshape(info.shape)
        for info in infos
    }


def _versions() -> dict[str, str]:
    """Versions of what made the file, for messages. Read from the installed packages: imports nothing."""
    from importlib import metadata

    found = {}
    for name in ("treadle", "apache-tvm", "apache-tvm-ffi", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
