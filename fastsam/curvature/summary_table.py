"""The summary of a spectrum as an HTML table, for notebooks."""

from __future__ import annotations

from collections.abc import Mapping

from fastsam.html_table import html_table


def summary_table(summary: Mapping[str, float | int | None], *, steps: int) -> str:
    """Return an HTML table of the numbers of a spectrum and their errors.

    Args:
        summary: result of :meth:`Spectrum.summary`.
        steps: Lanczos steps of the longest run.
    """

    def limit(name: str) -> str:
        return f"{summary[name]:.3g}"

    rows: list[tuple[str, float | int | None, str]] = [
        ("lambda_max", summary["lambda_max"], f"residual {limit('lambda_max_residual')}"),
        ("lambda_min", summary["lambda_min"], f"residual {limit('lambda_min_residual')}"),
        ("|lambda_min / lambda_max|", summary["ratio"], ""),
        ("trace", summary["trace"], f"standard error {limit('trace_stderr')}"),
        (
            "squared Frobenius norm",
            summary["frobenius_norm_squared"],
            f"standard error {limit('frobenius_norm_squared_stderr')}",
        ),
        (
            f"mass below {limit('threshold')}",
            summary["mass_below"],
            f"95 % limits {limit('mass_below_lower')} to {limit('mass_below_upper')}",
        ),
        ("loss", summary["loss"], ""),
        ("gradient norm", summary["gradient_norm"], ""),
        ("weight norm", summary["weight_norm"], ""),
        ("dimension", summary["dimension"], ""),
        ("probes", summary["probes"], ""),
        ("steps", steps, ""),
    ]
    return html_table(("spectrum", "value", "error"), rows)
