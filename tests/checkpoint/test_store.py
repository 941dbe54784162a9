"""A checkpoint is there, whole, or not at all."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain.checkpoint import store
from mmtrain.checkpoint.manifest import Manifest
from mmtrain.layout.dims import ParallelDims


def save(root: Path, step: int) -> Path:
    """A committed checkpoint of one rank."""
    partial = store.begin(root, step)
    name, entry = store.write_part(partial, 0, {"weight/w": torch.ones(3)})
    manifest = Manifest(
        step=step,
        dims=ParallelDims(),
        state={},
        recipe_hash="",
        code_version="",
        weights={},
        files={name: entry},
    )
    return store.commit(root, manifest)


def steps(root: Path) -> list[int]:
    return [store.step_of(folder) for folder in store.committed(root)]


def test_what_is_synced_before_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then the manifest, then their folder, then the rename, then the folder above."""
    seen = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Any:
        seen.append(("rename", target.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    save(tmp_path / "checkpoints", 7)
    assert seen == [
        ("fsync", "rank-00000.safetensors"),
        ("fsync", "manifest.json"),
        ("fsync", "step-00000007.partial"),
        ("rename", "step-00000007"),
        ("fsync", "checkpoints"),
    ]


def test_a_sound_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    before = (folder / "manifest.json").stat().st_ino
    assert save(tmp_path, 3) == folder
    assert (folder / "manifest.json").stat().st_ino == before
    assert steps(tmp_path) == [3]
    (folder / "rank-00000.safetensors").unlink()
    assert list(store.faults(save(tmp_path, 3))) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003",
        "step-00000003.damaged",
    ]


def test_the_oldest_go_first_and_multiples_stay(tmp_path: Path) -> None:
    for step in (2, 4, 5, 6, 8, 9):
        save(tmp_path, step)
    store.retain(tmp_path, 2, keep_every_steps=4)
    assert steps(tmp_path) == [4, 8, 9]
    store.retain(tmp_path, 0)
    assert steps(tmp_path) == [9]


def test_nothing_is_removed_while_the_newest_is_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003/rank-00000.safetensors").write_bytes(b"")
    store.retain(tmp_path, 1)
    assert steps(tmp_path) == [1, 2, 3]


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    store.begin(tmp_path, 2)
    (tmp_path / "step-00000000.removed").mkdir()
    (tmp_path / "step-00000009.damaged").mkdir()
    store.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000001",
        "step-00000009.damaged",
    ]
