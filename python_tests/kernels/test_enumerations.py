"""Values in both Python and C++ are equal: flags, dtype codes, and constants of the reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastsam.kernels import extension, reference
from python_tests.kernels.emulation import ROOT

CSRC = ROOT / "csrc"


def enumerators(header: str, name: str) -> dict[str, int]:
    """Return the enumerators of ``enum [class] name`` in a header of the launch API, by name."""
    text = (CSRC / "include" / "fastsam" / header).read_text()
    body = re.search(rf"enum (?:class )?{name} : int64_t {{([^}}]*)}}", text)
    assert body is not None, f"{header} has no enum {name}"
    plain = re.sub(r"//.*", "", body[1])
    items = [item.strip() for item in plain.split(",") if item.strip()]
    found = [re.fullmatch(r"k(\w+) = (\d+)", item) for item in items]
    assert all(found), f"expected kName = value everywhere, got {items}"
    return {match[1]: int(match[2]) for match in found if match is not None}


def constant(path: Path, name: str) -> float:
    """Return the value of ``constexpr TYPE name = value;`` in a C++ file."""
    found = re.search(rf"constexpr \w+ {name} = ([^;]+);", path.read_text())
    assert found is not None, f"{path} has no {name}"
    return float(found[1])


def test_dtype_codes() -> None:
    names = {
        str(dtype).removeprefix("torch."): code for dtype, code in extension.DTYPE_CODES.items()
    }
    expected = {name.lower(): code for name, code in enumerators("types.h", "DType").items()}
    assert names == expected


def test_flags() -> None:
    flags = enumerators("table.h", "Flag")
    bits = flags.pop("FlagBits")
    names = {name: getattr(extension, name.upper()) for name in flags}
    assert names == flags
    assert sorted(flags.values()) == [1 << bit for bit in range(bits)]


def test_every_enum_of_the_launch_api_is_compared() -> None:
    """Python reads the columns from the module; test_sam.py compares them with the headers."""
    found = {
        name
        for path in (CSRC / "include").rglob("*.h")
        for name in re.findall(r"^enum (?:class )?(\w+)", path.read_text(), re.MULTILINE)
    }
    assert found == {"DType", "Flag", "Column", "Hyper"}


@pytest.mark.parametrize(
    ("header", "name", "value"),
    [
        ("lanczos_math.h", "kBreakdownFactor", reference.BREAKDOWN_FACTOR),
        ("noise_math.h", "kPerCounter", reference.PER_COUNTER),
        ("sam_math.h", "kRoundedPerCounter", reference.ROUNDED_PER_COUNTER),
    ],
)
def test_constants_of_the_reference(header: str, name: str, value: float) -> None:
    assert constant(CSRC / "math" / header, name) == value
