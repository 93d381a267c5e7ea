"""The option ``--profile``, and the table that it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from fastsam.cli.output import show
from fastsam.longtail.training.profile import StepProfile
from fastsam.longtail.training.run_folder import PROFILE
from fastsam.text import notice

_NO_FOLDER = Path()
"""Value of the option without a folder."""

ProfileOption = Annotated[
    Path | None,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[FOLDER]",
        instance_from_str=lambda values: Path(*values),
        is_instance=lambda value: value is None or isinstance(value, Path),
        str_from_instance=lambda value: [] if value in (None, _NO_FOLDER) else [str(value)],
    ),
    arg(
        help="profile 20 steps after a warm-up of 5: print where the time goes, and write a trace of "
        "PyTorch's profiler to FOLDER/trace.json",
        help_behavior_hint="(FOLDER defaults to profile in --out, else in the current folder)",
    ),
]


def profile_folder(given: Path | None, out: Path | None) -> Path | None:
    """Return the folder of the profile; None without ``--profile``.

    Args:
        given: value of the option.
        out: folder of the run.
    """
    if given != _NO_FOLDER:
        return given
    return Path(PROFILE) if out is None else out / PROFILE


def show_profile(profile: StepProfile) -> None:
    """Print where the time of the profiled steps went."""
    from fastsam.report import TextTable

    if profile.steps == 0:
        notice("the run is too short for a profile, which begins after 5 steps; raise --epochs")
        return
    rows = tuple(
        (
            row.section,
            str(row.calls),
            f"{1e3 * row.seconds / row.calls:.2f}",
            "" if row.share is None else f"{100 * row.share:.1f}",
        )
        for row in profile.rows()
    )
    show(TextTable((f"{profile.steps} steps", "calls", "ms per call", "% of steps"), rows))
    show(f"trace, for https://ui.perfetto.dev: {profile.trace}")
