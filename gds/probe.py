"""What this machine can do for a store at a path, what that means, and the device that follows from it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from ..format.errors import InvalidConfig, PathUnavailable
from . import machine
from .device import Device
from .os_calls import MEMORY_FILE_SYSTEMS
from .posix import ALIGNMENT_BYTES, THREADS_DEFAULT, PosixDevice

GdsMode: TypeAlias = Literal["auto", "require", "off"]
Level: TypeAlias = Literal["good", "note", "problem"]

GDS_FILE_SYSTEMS = frozenset({"ext4", "xfs", "lustre", "gpfs", "nfs", "nfs4", "beegfs", "wekafs"})
"""File systems that cuFile can move data to and from without the CPU (ext4 in its ordered mode; network ones over RDMA)."""

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact, what it means for a store, and what to do (empty when nothing need be done)."""

    name: str
    value: str
    level: Level
    meaning: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class MachineReport:
    """All findings for a path. ``gds_missing`` lists, in words, what GPUDirect Storage lacks here (empty: nothing known)."""

    path: str
    direct: bool | None
    gds_missing: tuple[str, ...]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        return asdict(self)


def probe(path: str) -> MachineReport:
    """Look at the machine and at the file system of ``path`` (its nearest existing parent when it is not there yet).

    Writes one nameless temporary page, imports kvikio, does not initialise CUDA. Takes well under a second.
    """
    folder = machine.existing_folder(path)
    mount = machine.mount_of(folder)
    trial = machine.try_direct(folder)
    findings = [
        _file_system(folder, mount),
        _direct(trial),
        _alignment(trial),
        _free_space(folder),
        _drive(mount),
        _cuda_driver(),
        _gpus(),
        _kvikio(),
        _nvidia_fs(),
        _memlock(),
    ]
    return MachineReport(path=os.path.abspath(path), direct=trial.works, gds_missing=tuple(gds_missing(folder)), findings=tuple(findings))


def gds_missing(folder: str) -> list[str]:
    """What stands between this folder and GPUDirect Storage, as far as can be told without trying it."""
    missing = []
    mount = machine.mount_of(folder)
    if not machine.has_cuda_driver():
        missing.append("the NVIDIA driver (libcuda.so.1 cannot be loaded)")
    if machine.gpu_count() == 0:
        missing.append("a GPU (no accessible /dev/nvidia<number>)")
    if machine.kvikio_version() is None:
        missing.append("the Python package kvikio (pip install kvikio-cu13, or -cu12 for CUDA 12)")
    elif (reason := machine.kvikio_import_error()) is not None:
        missing.append(f"a working kvikio (its import fails: {reason})")
    if not machine.has_nvidia_fs():
        missing.append("the kernel module nvidia-fs (modprobe nvidia-fs; package nvidia-gds)")
    if mount is None or mount.file_system not in GDS_FILE_SYSTEMS:
        name = "unknown" if mount is None else mount.file_system
        missing.append(f"a file system that GDS supports (ext4 or XFS on local NVMe; this is {name})")
    elif mount.file_system == "ext4" and any(option in mount.options for option in ("data=journal", "data=writeback")):
        missing.append("ext4 in its ordered mode (mount option data=ordered)")
    return missing


def open_device(gds: GdsMode, path: str, *, threads: int = THREADS_DEFAULT) -> Device:
    """The device for a store at ``path``.

    ``off``: POSIX files. ``auto``: cuFile where a GPU, its driver and kvikio are there, else POSIX; ``Device.paths``
    tells what it came to. ``require``: cuFile with GDS proven by a transfer, else ``PathUnavailable`` with the list of what
    is missing.
    """
    if gds == "off":
        return PosixDevice(threads=threads)
    if gds == "auto":
        return _open_best(threads)
    if gds == "require":
        return _open_gds(path, threads)
    raise InvalidConfig("gds is unknown", expected="auto or require or off", actual=repr(gds))


def _open_best(threads: int) -> Device:
    usable = machine.gpu_count() > 0 and machine.has_cuda_driver() and machine.kvikio_version() is not None
    if usable and machine.kvikio_import_error() is None:
        from .cufile import CuFileDevice  # kvikio loads NVIDIA libraries: only where they can work

        return CuFileDevice(threads=threads)
    return PosixDevice(threads=threads)


def _open_gds(path: str, threads: int) -> Device:
    folder = machine.existing_folder(path)
    missing = gds_missing(folder)
    if not missing:
        from .cufile import CuFileDevice

        device = CuFileDevice(threads=threads, require_gds=True)
        try:
            device.prove_gds(folder)
        except PathUnavailable as error:
            device.close()
            missing = [str(error.actual or error.what)]
        else:
            return device
    raise PathUnavailable(
        "GPUDirect Storage was required (gds='require') and cannot be had",
        where=path,
        expected="driver, GPU, kvikio, nvidia-fs and a supported file system",
        actual="missing: " + "; ".join(missing),
        action="Install what is missing, or open with gds='auto' to take the best path there is.",
    )


# --- one function per finding ---------------------------------------------------------------------------------


def _file_system(folder: str, mount: machine.Mount | None) -> Finding:
    if mount is None:
        return Finding("file system", "unknown", "note", "The mount table does not name the file system of this path.")
    value = f"{mount.file_system} on {mount.point} ({','.join(mount.options)})"
    if mount.file_system == "overlay":
        return Finding(
            "file system",
            value,
            "problem",
            "An overlay is a container's own layer: it often refuses O_DIRECT, is slow, and is lost with the container.",
            "Put the store on a mounted volume (a host path on ext4 or XFS).",
        )
    if mount.file_system in MEMORY_FILE_SYSTEMS:
        return Finding(
            "file system",
            value,
            "problem",
            "Files here live in memory: they cost DRAM and do not survive a reboot.",
            "Put the store on a drive.",
        )
    if mount.file_system == "btrfs":
        return Finding(
            "file system",
            value,
            "note",
            "btrfs may serve O_DIRECT writes through the page cache when data checksums are on, and copies on write.",
            "Prefer ext4 or XFS, or set the folder to NOCOW (chattr +C) before the store is made.",
        )
    if "ro" in mount.options:
        return Finding(
            "file system", value, "problem", "It is mounted read-only: a store can be read, not written.", "Remount it writable."
        )
    return Finding("file system", value, "good", "A store can live here.")


def _direct(trial: machine.DirectTrial) -> Finding:
    if trial.works:
        return Finding("O_DIRECT", "works", "good", "Data moves between memory and drive without the page cache.")
    if trial.works is None:
        return Finding(
            "O_DIRECT", f"not tried: {trial.detail}", "note", "It could not be tried.", "Make the folder writable and try again."
        )
    return Finding(
        "O_DIRECT",
        f"refused: {trial.detail}",
        "problem",
        "All data goes through the page cache: several times slower, and the cache competes with the host for memory.",
        "Put the store on ext4 or XFS on a local drive.",
    )


def _alignment(trial: machine.DirectTrial) -> Finding:
    if not trial.works:
        return Finding("alignment", f"{ALIGNMENT_BYTES} bytes", "good", "The store's own unit; nothing else is asked for here.")
    value = f"memory {trial.memory_alignment_bytes}, offsets {trial.offset_alignment_bytes} bytes"
    if trial.offset_alignment_bytes <= ALIGNMENT_BYTES:
        return Finding("alignment", value, "good", f"The store's unit of {ALIGNMENT_BYTES} bytes satisfies it.")
    return Finding(
        "alignment",
        value,
        "problem",
        f"Requests in units of {ALIGNMENT_BYTES} bytes are refused by this drive and go through the page cache.",
        "Use a file system with a block size of 4096 bytes.",
    )


def _free_space(folder: str) -> Finding:
    state = os.statvfs(folder)
    free, total = state.f_bavail * state.f_frsize, max(1, state.f_blocks * state.f_frsize)
    value = f"{free / GIB:.1f} of {total / GIB:.1f} GiB"
    if free * 20 < total:
        return Finding(
            "free space",
            value,
            "problem",
            "Less than 5 % is free: the file system slows down, and a store that meets its end refuses puts.",
            "Free space, or choose a capacity that leaves a reserve.",
        )
    return Finding("free space", value, "good", "The capacity of a store must fit into this.")


def _drive(mount: machine.Mount | None) -> Finding:
    nvme = machine.is_on_nvme(mount)
    if nvme:
        return Finding("drive", "NVMe", "good", "A local NVMe drive: what the store is made for.")
    if nvme is None:
        return Finding("drive", "no local block device", "note", "Network, overlay or memory: latency and GDS depend on what is behind it.")
    source = "" if mount is None else f" ({mount.source})"
    return Finding("drive", f"not NVMe{source}", "note", "It works; GDS needs local NVMe, and other drives are slower.")


def _cuda_driver() -> Finding:
    if machine.has_cuda_driver():
        return Finding("CUDA driver", "libcuda.so.1 loads", "good", "Memory of a GPU can be used.")
    return Finding("CUDA driver", "absent", "note", "Host memory only, through POSIX files.", "Install the NVIDIA driver to use a GPU.")


def _gpus() -> Finding:
    count = machine.gpu_count()
    meaning = "Blocks can be stored from and loaded into GPU memory." if count else "Blocks are taken from and given to host memory."
    return Finding("GPUs", str(count), "good" if count else "note", meaning)


def _kvikio() -> Finding:
    version = machine.kvikio_version()
    if version is None:
        return Finding(
            "kvikio",
            "not installed",
            "note",
            "cuFile is not used; GPU memory is copied through host memory.",
            "On a machine with a GPU: pip install kvikio-cu13 (or -cu12).",
        )
    error = machine.kvikio_import_error()
    if error is not None:
        return Finding(
            "kvikio", f"{version}, import fails: {error}", "problem", "cuFile is not used.", "Reinstall it with its dependencies."
        )
    return Finding("kvikio", version, "good", "cuFile is used where a GPU and its driver are there.")


def _nvidia_fs() -> Finding:
    if machine.has_nvidia_fs():
        return Finding("nvidia-fs", "loaded", "good", "Drive and GPU can exchange data without host memory (GDS).")
    return Finding(
        "nvidia-fs",
        "not loaded",
        "note",
        "No GDS: data for a GPU takes the way through host memory (cuFile compat, or O_DIRECT and a copy).",
        "Install nvidia-gds and load the module where the drive and file system support it.",
    )


def _memlock() -> Finding:
    limit = machine.memlock_bytes()
    if limit is None:
        return Finding("memlock", "unlimited", "good", "The buffer can be page-locked for CUDA.")
    value = f"{limit / GIB:.2f} GiB"
    return Finding(
        "memlock",
        value,
        "note",
        "Page-locking more than this may be refused; copies to a GPU are then slower, nothing else changes.",
        "Raise it for the service (ulimit -l unlimited, or LimitMEMLOCK=infinity) when a GPU is used.",
    )
