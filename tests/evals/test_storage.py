"""Rows of features are stored where they fit, and leave nothing behind."""

import gc
import os
import tempfile

import pytest
import torch

from ldae.errors import InputError
from ldae.evals import features
from ldae.evals.features import allocate_rows, move_if_fits


def test_many_rows_lie_in_an_unnamed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAX_BYTES_IN_MEMORY", 4000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mapped = f"{tmp_path}/"
    rows = allocate_rows(100, 10)
    maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else mapped
    assert mapped in maps and not list(tmp_path.iterdir())
    assert rows.shape == (100, 10) and rows.dtype == torch.float32 and not rows.any()
    rows[torch.tensor([3, 99])] = 7.0
    assert rows.sum() == 140
    if os.path.exists("/proc/self/maps"):
        del rows
        gc.collect()
        assert mapped not in open("/proc/self/maps").read()


def test_few_rows_lie_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAX_BYTES_IN_MEMORY", 4001)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    assert allocate_rows(100, 10).shape == (100, 10)


def test_rows_move_to_a_gpu_with_twice_their_size_free(monkeypatch):
    rows, moved = torch.zeros(100, 10), []
    monkeypatch.setattr(torch.Tensor, "to", lambda rows, device: moved.append(device))
    for free in (8000, 8002):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**6))
        move_if_fits(rows, torch.device("cuda:0"))
    assert moved == [torch.device("cuda:0")]
    assert move_if_fits(rows, torch.device("cpu")) is rows


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "MAX_BYTES_IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="no room for features of .*No space left.*set TMPDIR"):
        allocate_rows(100, 10)
