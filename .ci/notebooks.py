"""Execute the notebooks of the documentation and write them as Markdown pages with figures.

An error in a cell stops the program with the traceback of the cell.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbformat import NotebookNode

TEMPLATE = Path(__file__).with_name("notebook.md.j2")
SECONDS = 300
"""Time limit of a cell; a loaded machine may be ten times slower than an idle one."""


def main(notebooks: Path, pages: Path) -> None:
    """Execute every notebook, and write ``NAME.md`` to ``pages`` and figures beside the notebook."""
    pages.mkdir(parents=True, exist_ok=True)
    for path in sorted(notebooks.glob("*.ipynb")):
        executed = execute(nbformat.read(path, as_version=4))
        text, figures = convert(executed, path.stem)
        for old in notebooks.glob(f"{path.stem}_*.png"):
            old.unlink()
        for name, content in figures.items():
            (notebooks / name).write_bytes(content)
        (pages / f"{path.stem}.md").write_text(text, encoding="utf-8")


def execute(notebook: NotebookNode) -> NotebookNode:
    """Execute a notebook with this Python in a temporary folder, and return it with its outputs."""
    environment = {
        **os.environ,
        # Where the command `fastsam` is.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # The networks are tiny. Two threads on two busy cores made them a hundred times slower.
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as sockets, tempfile.TemporaryDirectory() as folder:
        # Without folders of kernels, "python3" is the ipykernel of this Python, not an installed kernel.
        manager = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            transport="ipc",
            ip=f"{sockets}/kernel",
        )
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=SECONDS,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        executed: NotebookNode = client.execute(env=environment)
    return executed


def convert(notebook: NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """Return the Markdown of an executed notebook, and its figures by file name."""
    exporter = MarkdownExporter(template_file=str(TEMPLATE))
    text, resources = exporter.from_notebook_node(notebook, resources={"unique_key": name})
    figures: dict[str, bytes] = resources["outputs"]
    return text, figures


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
