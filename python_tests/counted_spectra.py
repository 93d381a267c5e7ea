"""Run ``fastsam spectrum`` with a fixed strategy and append each product to a file beside --out.

Tests that kill the command read from NAME-products.txt how many products were repeated. The product by
which a resumed run verifies its operator is not counted.

Usage: counted_spectra.py INTERVAL spectrum RUN ... --out DIR
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsam.cli.main import main
from fastsam.curvature import spectral_density
from fastsam.curvature.lanczos import resume
from fastsam.curvature.operators.model import ModelOperator
from fastsam.longtail import landscape as landscapes

if __name__ == "__main__":
    interval, arguments = float(sys.argv[1]), sys.argv[2:]
    out = Path(arguments[arguments.index("--out") + 1])
    product, verify = ModelOperator.matmat, resume.repeat_first_step

    def counted(self: ModelOperator, vectors: Tensor) -> Tensor:
        found = product(self, vectors)
        with (out.parent / f"{out.name}-products.txt").open("a") as file:
            file.write("1\n")
        return found

    def uncounted(*given: Any) -> Tensor:
        ModelOperator.matmat = product  # type: ignore[method-assign]
        try:
            return verify(*given)
        finally:
            ModelOperator.matmat = counted  # type: ignore[method-assign]

    def pinned(*given: Any, **options: Any) -> Any:
        options.update(strategy="rebuild", checkpoint_interval=interval)
        return spectral_density(*given, **options)

    ModelOperator.matmat = counted  # type: ignore[method-assign]
    resume.repeat_first_step = uncounted
    landscapes.spectral_density = pinned  # type: ignore[attr-defined]
    sys.exit(main(arguments))
