"""Writes the tables of README.md and docs/ from the results; a test compares sentences with the tables."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.eigenpairs import NETWORK_TOLERANCE
from benchmarks.late_ascent.tables import comparison
from benchmarks.late_ascent.tables import tables as late_ascent_tables
from benchmarks.longtail_methods.tables import tables as longtail_methods_tables
from benchmarks.machine import RESULTS
from benchmarks.scale import predictions
from fastsam.files import write_bytes, write_text
from fastsam.records import build
from fastsam.report import PairedComparison
from fastsam.report.figures import comparison_png

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = tuple(
    path
    for path in (README, *sorted((ROOT / "docs").rglob("*.md")))
    if "<!-- results:" in path.read_text("utf-8")
)
"""Documents with tables of results."""
FIGURE = ROOT / "docs" / "images" / "late-ascent.png"


@dataclass(frozen=True)
class Readme:
    """Rewrite the tables of README.md and docs/, and a figure, from benchmarks/results/."""

    def run(self) -> None:
        write_bytes(FIGURE, comparison_png(comparison()))
        for document in DOCUMENTS:
            write_text(document, rendered(document.read_text("utf-8")))


def rendered(text: str) -> str:
    """Replace every marked section of ``text`` by the table of the current results."""
    tables = {
        "sam-step": sam_step(),
        "train-step": train_step(),
        "spectrum": spectrum(),
        "products": products(),
        "eigenpairs": eigenpairs(),
        "tracking": tracking(),
        "data-path": data_path(),
        "scale": predictions(json.loads((RESULTS / "data_path-cpu.json").read_text())),
        "torch-operations": torch_operations(),
        "estimators": estimators(),
        "demo-short": demo(short=True),
        "demo": demo(short=False),
        "demo-verdicts": demo_verdicts(),
        "figures": figures(),
        **late_ascent_tables(),
        **longtail_methods_tables(),
    }
    for name, table in tables.items():
        pattern = rf"(<!-- results:{name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match: match[1] + table + match[2], text, flags=re.DOTALL)  # noqa: B023
    return text


def demo(*, short: bool) -> str:
    """Describe the results of the demo on each of its data sets.

    Args:
        short: show only the first and the last verdict of each: calibration, and the main comparison.
    """
    comparison, environment = stored_demo()
    lines = []
    for panel in comparison.panels:
        verdicts = panel.verdicts()
        shown = [verdicts[0], verdicts[-1]] if short else verdicts
        lines += [f"{panel.title} ({comparison.seeds} paired seeds, 95 % intervals):", ""]
        lines += [f"- **{verdict}** {numbers}" for verdict, numbers in shown] + [""]
    if not short:
        lines += [f"On {environment['processor']}, `{environment['command']}`."]
    return "\n".join(lines) + "\n"


def demo_verdicts() -> str:
    """Return a table with the verdict on each comparison of the demo, on both processors that ran it."""
    panels = stored_demo()[0].panels
    others = stored_demo("demo-avx512.json")[0].panels
    lines = ["| data | comparison | verdict | on a second processor |", "| --- | --- | --- | --- |"]
    for panel, other in zip(panels, others, strict=True):
        for (sentence, _), (again, _) in zip(panel.verdicts(), other.verdicts(), strict=True):
            compared, verdict = sentence.rstrip(".").rsplit(": ", 1)
            lines.append(
                f"| {panel.title} | {compared} | {verdict} | "
                f"{again.removeprefix(compared).strip(':. ')} |"
            )
    return "\n".join(lines) + "\n"


def stored_demo(name: str = "demo-cpu.json") -> tuple[PairedComparison, dict[str, Any]]:
    """Load the results of the demo, and the environment in which it ran."""
    stored = json.loads((RESULTS / name).read_text())
    environment: dict[str, Any] = stored.pop("environment")
    return build(PairedComparison, stored), environment


def figures() -> str:
    """Return the numbers behind the pictures of spectra."""
    path = RESULTS / "figures-cpu.json"
    if not path.exists():
        return ""
    stored = json.loads(path.read_text())
    lines = [
        "| spectrum | lambda_min | lambda_max | ratio | trace | loss | gradient norm | weight norm |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['name']} | {row['lambda_min']:.3g} | {row['lambda_max']:.3g} | {row['ratio']:.2g} | "
        f"{row['trace']:.3g} +- {row['trace_stderr']:.2g} | {row['loss']:.2g} | {row['gradient_norm']:.2g} | "
        f"{row['weight_norm']:.3g} |"
        for row in stored["rows"]
    ]
    return "\n".join(lines) + "\n"


def sam_step() -> str:
    """Return one table per device with results."""
    parts = [_sam_step_table(path) for path in sorted(RESULTS.glob("sam_step-*.json"))]
    return "\n".join(parts)


def train_step() -> str:
    """Return a table of whole training steps for every device with results."""
    parts = []
    for path in sorted(RESULTS.glob("train_step-*.json")):
        stored = json.loads(path.read_text())
        for name, case in stored["cases"].items():
            size = case["workload"]
            rows = case["contestants"]
            lines = [
                f"{name}, {size['batch_size']} images of {size['image_size']} pixels, medians of "
                f"{rows['sgd eager']['samples']} interleaved samples on "
                f"{_machine(stored['environment'])} (`{stored['environment']['command']}`):",
                "",
                "| step | time | images per second | times SGD |",
                "| --- | --- | --- | --- |",
            ]
            for way, row in rows.items():
                if way in case.get("disagreeing", ()):
                    lines.append(f"| {way} | does not count: other weights | | |")
                    continue
                ratio = row["median"] / rows["sgd eager"]["median"]
                lines.append(
                    f"| {way} | {_time(row['median'])} | {size['batch_size'] / row['median']:.0f} | "
                    f"{ratio:.2f}x |"
                )
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def torch_operations() -> str:
    """Compare PyTorch operations with native kernels, in one table per device with results."""
    parts = []
    for path in sorted(RESULTS.glob("torch_operations-*.json")):
        stored = json.loads(path.read_text())
        environment, rows = stored["environment"], stored["rows"]
        lines = [
            f"On {environment.get('gpu', {}).get('name') or environment['processor']}, "
            f"{_counted(rows[0]['threads'], 'thread')}, torch {environment['torch']} "
            f"(`{environment['command']}`):",
            "",
            "| step | native | PyTorch operations | plain PyTorch |",
            "| --- | --- | --- | --- |",
        ]
        for row in rows:
            native, plain = row["peers"]["native"]["median"], row["peers"].get("plain PyTorch")
            ratio = row["ratio"]
            last = "" if plain is None else f"{plain['median'] / native:.2f}x"
            lines.append(
                f"| {row['case']} | {native * 1e3:.2f} ms | {ratio['median']:.2f}x "
                f"[{ratio['lower']:.2f}, {ratio['upper']:.2f}] | {last} |"
            )
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def estimators() -> str:
    """Return the errors and the coverage of stochastic estimators on curvature matrices."""
    path = RESULTS / "estimators-cpu.json"
    if not path.exists():
        return ""
    stored = json.loads(path.read_text())
    environment, rows, settings = stored["environment"], stored["rows"], stored["settings"]
    budgets = [key for key in rows[0] if key.startswith("trace, ")]
    others = [key for key in rows[0] if key.startswith(("frobenius_norm", "log_determinant"))]
    names = list(rows[0][budgets[0]])
    lines = [
        f"{settings['samples']} digits, {settings['seeds']} seeds, torch {environment['torch']} "
        f"(`{environment['command']}`). Root-mean-square error of Hutchinson's method divided by that of "
        "each method: above 1x is more accurate than Hutchinson's method. In brackets, the share of 95 % "
        "intervals that hold the exact trace. [Papers](../papers.md) names the papers of hutch++ and xtrace.",
        "",
        "| matrix | products | " + " | ".join(names) + " |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    for row in rows:
        matrix = f"{row['network']}, {row['kind']}, n = {row['dimension']}"
        for budget in budgets:
            cells = [f"{one['gain']:.1f}x ({one['coverage']:.0%})" for one in row[budget].values()]
            number = re.sub(r"\D", "", budget)
            lines.append(f"| {matrix} | {number} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Root-mean-square error divided by the exact value, and the share of 95 % intervals that hold it:",
        "",
        "| matrix | estimator | relative error | coverage |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        for key in others:
            exact = abs(row["exact"][key.partition(",")[0]])
            lines.append(
                f"| {row['network']}, {row['kind']} | {key.replace('_', ' ')} | "
                f"{row[key]['rms'] / exact:.1e} | {row[key]['coverage']:.0%} |"
            )
    return "\n".join(lines) + "\n"


def _sam_step_table(path: Path) -> str:
    results = json.loads(path.read_text())
    environment = results["environment"]
    rows = results["rows"]
    threads = max(row["threads"] for row in rows)
    shown = [row for row in rows if row["threads"] == threads]
    others = [peer for peer in shown[0]["peers"] if peer != "fastsam"]
    place = (
        environment.get("gpu", {}).get("name")
        or f"{environment['processor']}, {_counted(threads, 'thread')}"
    )
    lines = [
        f"On {place}, torch {environment['torch']} (`{environment['command']}`). "
        "Times relative to fastsam, medians of paired samples:",
        "",
        "| shapes | base | fastsam | " + " | ".join(others) + " |",
        "| --- |" + " --- |" * (len(others) + 2),
    ]
    for row in shown:
        cells = [
            f"{row['peers'][peer]['ratio']['median']:.2f}x" if peer in row["peers"] else ""
            for peer in others
        ]
        title = f"{row['case']}: {row['tensors']} tensors, {row['parameters'] / 1e6:.3g} M"
        ours = _time(row["peers"]["fastsam"]["median"])
        lines.append(f"| {title} | {row['base']} | {ours} | " + " | ".join(cells) + " |")
    lines += ["", _slowest_sentence(rows, results["summary"])]
    sweep = path.with_name(path.name.replace("sam_step", "sam_sweep"))
    if sweep.exists():
        lines += ["", _sweep_sentence(json.loads(sweep.read_text()))]
    return "\n".join(lines) + "\n"


def _slowest_sentence(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """Describe the least favorable result over all rows, including those that the table omits."""
    counts = sorted({row["threads"] for row in rows})
    closest = min(summary, key=lambda peer: summary[peer]["smallest"])
    faster = sorted({where for row in summary.values() for where in row["faster_beyond_interval"]})
    verdict = (
        f"a baseline is significantly faster at {'; '.join(faster)}"
        if faster
        else "no baseline is significantly faster in any row"
    )
    return (
        f"The table shows the rows with {counts[-1]} threads. Over all {len(rows)} measured rows, with "
        f"{' and '.join(map(str, counts))} threads, the baseline closest to fastsam is {closest}: "
        f"{summary[closest]['smallest']:.2f}x at {summary[closest]['where']}. By the 95 % interval of the "
        f"paired median, {verdict}."
    )


def _sweep_sentence(results: dict[str, Any]) -> str:
    """Describe the least favorable result in the sweep over tensors and elements."""
    rows = results["rows"]
    summary = results["summary"].values()
    cases = {row["case"] for row in rows}
    sizes = [row["parameters"] // row["tensors"] for row in rows]
    counts = [row["tensors"] for row in rows]
    least = min(row["smallest"] for row in summary)
    medians = [row["median"] for row in summary]
    return (
        f"Over {len(cases)} more shapes, {min(counts)} to {max(counts)} tensors of {min(sizes):,} to "
        f"{max(sizes):,} elements, every baseline is at least {least:.2f}x slower; median slowdowns are "
        f"{min(medians):.1f}x to {max(medians):.1f}x."
    )


RUNS = {"density": "density", "everything": "extremes, trace and density"}
"""Parts of the spectrum benchmark that time whole runs, and the results of such a run."""


def spectrum() -> str:
    """Return tables of whole runs for every device with results, and of known extremes."""
    parts = []
    for path in sorted(RESULTS.glob("spectrum-density-*.json")):
        device = path.stem.rpartition("-")[2]
        parts.append(_spectrum_table(device))
    correct = RESULTS / "spectrum-correctness-cpu.json"
    if correct.exists():
        parts.append(_known_extremes(json.loads(correct.read_text())))
    return "\n".join(parts)


def products() -> str:
    """Return a table of single Hessian-vector products for every device with results."""
    parts = []
    for path in sorted(RESULTS.glob("spectrum-products-*.json")):
        stored = json.loads(path.read_text())
        settings, rows = stored["settings"], stored["products"]
        lines = [
            f"{settings['model']}, {settings['batches']} batches of {settings['batch_size']}, "
            f"{settings['pixels']} px, median of {settings['rounds']} interleaved runs, on "
            f"{_machine(stored['environment'])} (`{stored['environment']['command']}`):",
            "",
            "| library | product | in gradients | ratio to fastsam |",
            "| --- | --- | --- | --- |",
        ]
        for name, row in rows.items():
            if name == "gradient" or name.startswith("re-orthogonal"):
                continue
            ratio = row["times_fastsam"]
            bounds = f" [{ratio['lower']:.2f}, {ratio['upper']:.2f}]" if name != "fastsam" else ""
            lines.append(
                f"| {name} | {_time(row['median'])} | {row['gradients']:.2f} | "
                f"{ratio['median']:.2f}x{bounds} |"
            )
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def eigenpairs() -> str:
    """Compare eigenpairs with ARPACK: products on explicit spectra, time on a network."""
    stored = json.loads((RESULTS / "eigenpairs-cpu.json").read_text())
    summary, rows = stored["spectra"]["summary"], stored["network"]
    others = [name for name in rows[0]["products"] if name != "fastsam"]
    settings, spectra = stored["settings"], {row["spectrum"] for row in stored["spectra"]["rows"]}
    lines = [
        f"{len(spectra)} explicit spectra of dimension {settings['dimension']}, tolerance "
        f"{settings['tolerance']:g}, one and five pairs at each end and by magnitude: "
        f"{len(stored['spectra']['rows'])} runs of each (`{stored['environment']['command']}`).",
        "",
        f"- In the {summary['compared']} runs where ARPACK returns all pairs, fastsam takes "
        f"{summary['median']:.2f} times as many products in the median, {summary['largest']:.2f} times at "
        "most.",
        f"- ARPACK does not converge in {summary['eigsh unconverged']} runs and misses a pair in "
        f"{summary['eigsh wrong']}. fastsam does not converge in {summary['fastsam unconverged']}, and "
        "warns.",
        "",
        f"Hessian of a ResNet-8 at its initial weights, tolerance {NETWORK_TOLERANCE:.0e}, on "
        f"{_machine(stored['environment'])}. Number of products, and CPU time: seconds for "
        "fastsam, multiples of fastsam's time for the others:",
        "",
        "| pairs | fastsam | " + " | ".join(others) + " |",
        "| --- | --- |" + " --- |" * len(others),
    ]
    for row in rows:
        cells = [
            f"{row['products'][name]} products, {1 / row['ratio'][name]:.2f}x" for name in others
        ]
        lines.append(
            f"| {row['k']} {row['which']} | {row['products']['fastsam']} products, "
            f"{row['CPU seconds']['fastsam']:.2f} s | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def tracking() -> str:
    """Return the overhead and the errors of curvature tracking."""
    stored = json.loads((RESULTS / "tracking-cpu.json").read_text())
    settings = stored["settings"]
    lines = [
        f"A ResNet-8, {settings['steps']} steps of SAM on digits with batches of {settings['batch_size']}, "
        f"on {_machine(stored['environment'])} (`{stored['environment']['command']}`):",
        "",
        "| tracked | measured steps | overhead | products | products until convergence | "
        "error of lambda_max | error of lambda_min |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in stored["rows"]:
        steps = {point["step"] for point in row["points"]}
        when = "no budget" if row["budget"] is None else f"budget {row['budget']:.0%}"
        errors = (f"{row['largest error'][name]:.2%}" for name in ("lambda_max", "lambda_min"))
        lines.append(
            f"| {' and '.join(row['groups'])}, {row['samples']} samples each, every {row['every']} steps, "
            f"{when} | {len(steps)} | {row['overhead']:.1%} | {row['products']} | "
            f"{row['converged products']} | " + " | ".join(errors) + " |"
        )
    return "\n".join(lines) + "\n"


def data_path() -> str:
    """Return the CPU time of a worker per image, and the time of the part on the device."""
    stored = json.loads((RESULTS / "data_path-cpu.json").read_text())
    settings = stored["settings"]
    names = {
        "fastsam": "fastsam" + (" with TorchCodec" if stored["torchcodec"] else ""),
        "fastsam, Pillow": "fastsam with Pillow",
        "fastsam, packed": "fastsam on a packed copy",
        "before": f"fastsam at commit {settings['before']}",
        "script": "torchvision transforms of Pillow images, as in official scripts",
    }
    lines = [
        f"CPU time of one worker per image, median of {stored['worker']['training']['fastsam']['samples']} "
        f"samples on {stored['environment']['processor']}, for JPEG files of "
        f"{settings['width']}x{settings['height']} pixels and {settings['mean_bytes'] / 1000:.0f} KB in the "
        f"mean (`{stored['environment']['command']}`). Ratios to the first row (above 1x is slower) are "
        "medians of paired samples, with 95 % intervals. Pillow decodes evaluation images in both of the "
        "first two rows:",
        "",
        "| reader | training | | evaluation | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, name in names.items():
        cells = []
        for part in ("training", "evaluation"):
            row = stored["worker"][part].get(key)
            if row is None:
                cells += ["", ""]
                continue
            ratio = row["times_fastsam"]
            cells.append(f"{row['median'] * 1e3:.2f} ms")
            cells.append(
                ""
                if key == "fastsam"
                else f"{ratio['median']:.2f}x [{ratio['lower']:.2f}, {ratio['upper']:.2f}]"
            )
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    device = stored["device_part"]
    lines += [
        "",
        f"The part on the device is not in the table. On one thread of this CPU it takes "
        f"{device['augment, normalize']['cpu_median'] * 1e3:.2f} ms per training image and "
        f"{device['normalize']['cpu_median'] * 1e3:.2f} ms per evaluation image. After resizing, the pixels "
        "that a worker hands over differ from those of Pillow's resizing by at most "
        f"{stored['checks']['largest_difference_from_pillow']} of 255.",
    ]
    return "\n".join(lines) + "\n"


def _spectrum_table(device: str) -> str:
    lines: list[str] = []
    for part, gives in RUNS.items():
        path = RESULTS / f"spectrum-{part}-{device}.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text())
        settings = results["settings"]
        if not lines:
            lines = [
                f"{settings['model']}, {settings['steps']} steps, median of "
                f"{_counted(settings['rounds'], 'run')}, on "
                f"{_machine(results['environment'])}; commands in benchmarks/results:",
                "",
                "| task | library | time (ratio to fastsam) |",
                "| --- | --- | --- |",
            ]
        what = f"{gives}, {settings['batches']} batches of {settings['batch_size']}"
        for name, row in results[part].items():
            cell = f"{_time(row['median_seconds'])} ({row['times_fastsam']:.2f}x)"
            if differing := row.get("disagrees_on"):
                cell = f"does not count: other {' and '.join(differing)}"
            lines.append(f"| {what} | {name} | {cell} |")
    return "\n".join(lines) + "\n"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _known_extremes(results: dict[str, Any]) -> str:
    lines = [
        "Operators with known extremes. The exact values are those of the matrix in float32, whose "
        f"rounding makes eigenvalues of 0 slightly negative (`{results['environment']['command']}`):",
        "",
        "| operator | exact | fastsam | PyHessian: Lanczos | PyHessian: power iteration |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, case in results["correctness"].items():
        cells = [
            f"{case[who]['lambda_min']:.4g}, {case[who]['lambda_max']:.4g}"
            for who in ("exact", "fastsam", "pyhessian")
        ]
        cells.append(f"{case['pyhessian']['lambda_max_by_power_iteration']:.4g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _machine(environment: dict[str, Any]) -> str:
    name = environment.get("gpu", {}).get("name")
    threads = environment["threads"]
    name = name or f"{environment['processor']}, {_counted(threads, 'thread')}"
    return f"{name}, torch {environment['torch']}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds:.2f} s"
