"""The run folder's primitives, against real full disks, real kills and real second processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment, full_disk_after
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.artifacts import (
    building_folder,
    fingerprint,
    fingerprint_path,
    open_tensors,
    read_json,
    replace_contents,
    save_tensors,
    write_atomic,
    write_json,
)
from compress.errors import ArtifactError


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    tensors = tmp_path / "t.safetensors"
    save_tensors(tensors, {"a": torch.zeros(3)})
    folder = tmp_path / "folder"
    with building_folder(folder) as building:
        (building / "x").write_text("old")
    before = contents(tmp_path)
    with full_disk_after(4096):
        with pytest.raises(ArtifactError, match=r"file\.json: the disk is full.*nothing was replaced.*run_dir="):
            write_json(path, ["x" * 10000])
        with pytest.raises(ArtifactError, match=r"t\.safetensors: the disk is full"):
            save_tensors(tensors, {"a": torch.zeros(3000)})
        with pytest.raises(ArtifactError, match=r"folder: the disk is full"), building_folder(folder) as building:
            (building / "x").write_bytes(b"x" * 10000)
    assert contents(tmp_path) == before
    write_json(path, ["x" * 10000])  # with space again, the same call succeeds
    assert read_json(path) == ["x" * 10000]


def test_a_small_file_system_that_fills_up_is_a_full_disk(tmp_path: Path) -> None:
    """The same against ENOSPC of a real file system, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if mount is None or subprocess.run([mount, *options], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    try:
        write_json(disk / "kept.json", 1)
        with pytest.raises(ArtifactError, match="the disk is full"):
            write_atomic(disk / "kept.json", b"x" * 200_000)
        with pytest.raises(ArtifactError, match="the disk is full"):
            save_tensors(disk / "t.safetensors", {"a": torch.zeros(50_000)})
        assert contents(disk) == {"kept.json": b"1\n"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_error_while_building_leaves_the_old_folder_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for content in ("first", "second"):
        with building_folder(folder) as building:
            assert not list(building.iterdir()), "it begins empty"
            (building / content).write_text(content)
        assert contents(folder) == {content: content.encode()}

    def fail() -> None:
        with building_folder(folder) as building:
            (building / "third").write_text("third")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert contents(tmp_path) == {"folder/second": b"second"}


KILLED = """
import os, sys, signal
from pathlib import Path
from compress.artifacts import building_folder, write_json
path = Path(sys.argv[1])
with building_folder(path) as building:
    (building / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with building_folder(folder) as building:
        (building / "x").write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], env=environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert contents(folder) == {"x": b"old"}
    assert len(list(tmp_path.iterdir())) == 2
    with building_folder(folder) as building:
        (building / "x").write_text("new")
    assert contents(tmp_path) == {"folder/x": b"new"}


def test_replacing_a_stage_keeps_what_the_pipeline_has_there(tmp_path: Path) -> None:
    target, building = tmp_path / "stage", tmp_path / "new"
    for name in ("manifest.json", "started.json", "error.json", ".lock", "old.txt", "sub/old.txt"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(name)
    building.mkdir()
    (building / "config.json").write_text("{}")
    replace_contents(building, target)
    assert {f.name for f in target.iterdir()} == {"manifest.json", "started.json", "error.json", ".lock", "config.json"}
    assert not building.exists()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_follow_the_umask(umask: int, tmp_path: Path) -> None:
    old = os.umask(umask)
    try:
        save_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(3)})
        write_json(tmp_path / "j.json", 1)
        with building_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(old)
    for name in ("t.safetensors", "j.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize(
    ("content", "said"), [("{", "not valid JSON"), ("\xff\xfe{}", "not valid JSON"), (None, "is missing")]
)
def test_damaged_json_is_named(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ArtifactError, match=rf"index\.json.*{said}.*fetch or make it again"):
        read_json(path)
    (tmp_path / "manifest.json").write_text("{}")  # a stage's folder is made again by its stage
    with pytest.raises(ArtifactError, match=rf"index\.json.*{said}.*delete {tmp_path} and run its stage again"):
        read_json(path)


def test_json_that_others_cannot_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_tensors_that_are_missing_truncated_or_foreign_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(ArtifactError, match=r"t\.safetensors is missing"):
        open_tensors(path)
    save_tensors(path, {"a": torch.arange(100)})
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", b"PK\x03\x04 some zip", whole + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"t\.safetensors is not a complete safetensors file.*again"):
            open_tensors(path)


FILES = st.dictionaries(st.sampled_from(["a", "b", "c/d"]), st.binary(max_size=20), min_size=1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=FILES, two=FILES)
def test_fingerprints_are_equal_exactly_when_names_and_bytes_are(
    one: dict[str, bytes], two: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folders = []
    for files in (one, two):
        folder = tmp_path_factory.mktemp("f")
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        (folder / ".cache").mkdir()
        (folder / ".cache" / str(len(folders))).write_text("not part of it")
        folders.append(fingerprint_path(folder))
    assert (folders[0] == folders[1]) == (one == two)


@pytest.mark.parametrize("place", [0, 4_999_999, 2_500_000])
def test_a_large_file_is_sampled_from_end_to_end(place: int, tmp_path: Path) -> None:
    path = tmp_path / "large"
    data = bytearray(5_000_000)
    path.write_bytes(data)
    before = fingerprint_path(path)
    data[max(place - 100_000, 0) : place + 100_000] = b"x" * len(data[max(place - 100_000, 0) : place + 100_000])
    path.write_bytes(data)
    assert fingerprint_path(path) != before
    path.write_bytes(data + b"x")
    assert fingerprint_path(path) != before
    with pytest.raises(ArtifactError, match="does not exist"):
        fingerprint_path(tmp_path / "none")


def test_the_fingerprint_of_settings_knows_no_order_but_every_value() -> None:
    assert fingerprint({"a": 1, "b": [2, None]}) == fingerprint({"b": [2, None], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5}) != fingerprint({"a": "1"})
