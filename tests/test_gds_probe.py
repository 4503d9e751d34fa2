"""What a machine can do is found out and said: ``require`` fails with all that is missing, ``auto`` reports what it got."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvlode
from kvlode import InvalidConfig, Namespace, PathUnavailable, Status
from kvlode.gds import machine, probe
from kvlode.gds.device import IoPath
from kvlode.gds.machine import Mount, existing_folder, mount_of
from kvlode.gds.posix import PosixDevice
from kvlode.gds.probe import gds_missing, open_device
from model import block_bytes

GOOD = {
    "has_cuda_driver": lambda: True,
    "gpu_count": lambda: 1,
    "kvikio_version": lambda: "kvikio-cu13 26.10.0",
    "kvikio_import_error": lambda: None,
    "has_nvidia_fs": lambda: True,
    "mount_of": lambda path: Mount("/", "ext4", ("rw",), "259:1", "/dev/nvme0n1p1"),
}
"""A machine on which nothing is known to be missing."""

MISSING = {
    "has_cuda_driver": (lambda: False, "the NVIDIA driver"),
    "gpu_count": (lambda: 0, "a GPU"),
    "kvikio_version": (lambda: None, "the Python package kvikio"),
    "kvikio_import_error": (lambda: "ImportError: libcufile.so.0", "its import fails: ImportError: libcufile.so.0"),
    "has_nvidia_fs": (lambda: False, "the kernel module nvidia-fs"),
    "mount_of": (lambda path: Mount("/", "overlay", ("rw",), "0:1", "overlay"), "this is overlay"),
}


def on_machine(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    for name, fact in (GOOD | facts).items():
        monkeypatch.setattr(machine, name, fact)


# --- require --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", sorted(MISSING))
def test_each_part_that_gds_needs_is_named_when_it_is_missing(part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_machine(monkeypatch)
    assert gds_missing(str(tmp_path)) == []
    fact, words = MISSING[part]
    on_machine(monkeypatch, **{part: fact})
    missing = gds_missing(str(tmp_path))
    assert len(missing) == 1 and words in missing[0]
    with pytest.raises(PathUnavailable, match="GPUDirect Storage was required") as caught:
        open_device("require", str(tmp_path))
    assert words in str(caught.value) and "gds='auto'" in str(caught.value)


@pytest.mark.parametrize("options", [("rw", "data=journal"), ("rw", "data=writeback")])
def test_ext4_that_does_not_order_its_data_is_no_place_for_gds(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_machine(monkeypatch, mount_of=lambda path: Mount("/", "ext4", options, "259:1", "/dev/nvme0n1p1"))
    assert ["ordered" in missing for missing in gds_missing(str(tmp_path))] == [True]


def test_everything_that_is_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = {name: fact for name, (fact, _) in MISSING.items() if name != "kvikio_import_error"}
    on_machine(monkeypatch, **facts)
    with pytest.raises(PathUnavailable) as caught:
        open_device("require", str(tmp_path / "not made yet" / "store"))
    assert all(words in str(caught.value) for name, (_, words) in MISSING.items() if name in facts)


@pytest.mark.skipif("machine.gpu_count() > 0", reason="this machine has a GPU")
def test_a_store_that_requires_gds_does_not_open_here_and_leaves_no_lock_behind(tmp_path: Path) -> None:
    with pytest.raises(PathUnavailable, match="a GPU"):
        kvlode.open(tmp_path / "store", capacity="256MiB", gds="require")
    with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB", gds="auto") as store:
        assert store.stats()["role"] == "writer"


def test_an_unknown_mode_is_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="auto or require or off"):
        open_device("maybe", str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="auto or require or off"):
        kvlode.open(tmp_path / "store", gds="maybe")  # type: ignore[arg-type]


# --- auto -----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("machine.gpu_count() > 0", reason="this machine has a GPU")
@pytest.mark.parametrize("mode", ["auto", "off"])
def test_a_store_says_which_path_its_bytes_took(mode: Any, tmp_path: Path) -> None:
    descriptor = Namespace(model="m", revision="1", dtype="bfloat16", layout="flat", tokens_per_block=16, block_bytes_max=256 << 10)
    with kvlode.open(tmp_path / "store", capacity="256MiB", buffer="8MiB", gds=mode, serve_clean=False, codec="raw") as store:
        space = store.namespace(descriptor)
        block = block_bytes(b"k", 0, 256 << 10)
        assert space.put(b"k", block) and store.flush(60.0)
        out = np.zeros_like(block)
        assert space.get_into(b"k", out) is Status.HIT and np.array_equal(out, block)
        io, paths = store.stats()["io"], store.stats()["io_paths"]
    assert set(io) <= {"o_direct", "buffered"}, "no path is reported that was not taken"
    assert paths in ({"host": "o_direct"}, {"host": "buffered"})
    assert sum(counter["write_bytes"] for counter in io.values()) >= block.nbytes
    assert sum(counter["read_bytes"] for counter in io.values()) >= block.nbytes


def test_auto_without_a_gpu_is_posix_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for part in ("has_cuda_driver", "gpu_count", "kvikio_version", "kvikio_import_error"):
        on_machine(monkeypatch, **{part: MISSING[part][0]})
        device = open_device("auto", str(tmp_path))
        assert isinstance(device, PosixDevice), part
        assert device.paths() == {"host": IoPath.DIRECT} and not device.accepts_device_memory
        device.close()


# --- the facts ------------------------------------------------------------------------------------------------------------


def test_the_report_is_plain_values_and_every_finding_says_what_it_means(tmp_path: Path) -> None:
    report = probe.probe(str(tmp_path / "not made yet"))
    plain = json.loads(json.dumps(report.to_dict()))
    assert {finding["name"] for finding in plain["findings"]} >= {
        "file system",
        "O_DIRECT",
        "CUDA driver",
        "kvikio",
        "nvidia-fs",
        "memlock",
    }
    for finding in plain["findings"]:
        assert finding["value"] and finding["meaning"] and finding["level"] in ("good", "note", "problem")
        assert finding["level"] != "problem" or finding["advice"], f"{finding['name']} is a problem without advice"
    assert list(tmp_path.iterdir()) == [], "the probe leaves nothing behind"


def test_o_direct_is_tried_and_not_guessed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trial = machine.try_direct(str(tmp_path))
    assert trial.works in (True, False) and trial.detail
    if os.path.isdir("/dev/shm"):
        assert machine.try_direct("/dev/shm").works is False, "memory has no direct path"
    monkeypatch.setattr(machine, "set_direct", lambda descriptor: False)
    assert machine.try_direct(str(tmp_path)).works is False

    def fails(descriptor: int, buffers: Any, offset: int) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.undo()
    monkeypatch.setattr(os, "pwritev", fails)
    trial = machine.try_direct(str(tmp_path))
    assert (trial.works is False and "Invalid argument" in trial.detail) or not trial.works
    assert machine.try_direct(str(tmp_path / "absent")).works is None
    assert list(tmp_path.iterdir()) == []


def test_the_mount_of_a_path_is_the_longest_one_and_the_last_of_equals(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "2 1 8:2 / /data rw - xfs /dev/sdb rw,noquota\n"
        "3 1 8:3 / /data\\040two ro - ext4 /dev/sdc ro\n"
        "4 1 8:4 / /data rw - overlay overlay rw\n"
        "not a line of a mount table\n"
    )
    mount = mount_of("/data/store", str(table))
    assert mount is not None and (mount.point, mount.file_system, mount.device) == ("/data", "overlay", "8:4")
    mount = mount_of("/data two/store", str(table))
    assert mount is not None and (mount.point, mount.options) == ("/data two", ("ro",))
    mount = mount_of("/database", str(table))
    assert mount is not None and mount.point == "/"
    assert mount_of("/x", str(tmp_path / "absent")) is None


def test_the_nearest_existing_folder_stands_for_a_path_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert existing_folder(str(tmp_path / "a" / "b")) == str(tmp_path.resolve())
    assert existing_folder(str(tmp_path / "file")) == str(tmp_path.resolve())
    assert existing_folder(str(tmp_path)) == str(tmp_path.resolve())
