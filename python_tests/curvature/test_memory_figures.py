"""Free memory: that of the machine, limited by a control group."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastsam.curvature import memory

CPU = torch.device("cpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux reports it in a file")
def test_free_memory_is_what_the_kernel_reports(monkeypatch):
    monkeypatch.setattr(memory, "_free_in_group", lambda: None)
    lines = Path("/proc/meminfo").read_text().splitlines()
    (available,) = (int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    assert memory.available_bytes(CPU) == pytest.approx(available, rel=0.1)


def test_a_control_group_may_leave_less(monkeypatch):
    monkeypatch.setattr(memory, "_free_in_group", lambda: 12_345)
    assert memory.available_bytes(CPU) == 12_345
    monkeypatch.setattr(memory, "_free_in_group", lambda: 2**60)
    assert memory.available_bytes(CPU) < 2**60


def test_other_devices_are_not_known():
    assert memory.available_bytes(torch.device("meta")) is None


def test_a_plan_uses_a_fraction_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    assert memory.plan_bytes(CPU, None) == 800
    assert memory.plan_bytes(CPU, 5) == 5
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    assert memory.plan_bytes(CPU, None) is None
