"""Adam (Kingma and Ba 2015)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Adam

from fastsam.longtail.base_optimizers.base import (
    BaseOptimizer,
    OptimizerInputs,
    OptimizerSettings,
    register_base_optimizer,
)
from fastsam.longtail.errors import UsageError
from fastsam.longtail.settings import Entry, layer, setting

TORCH = "torch's default"


@dataclass(frozen=True, kw_only=True)
class AdamSettings(OptimizerSettings):
    """Settings of Adam and AdamW."""

    adam_betas: tuple[float, float] = setting(
        "decay of the averages of the gradient and of its square in Adam",
        default=Entry((0.9, 0.999), TORCH),
        low=0,
        high=1,
    )
    adam_eps: float = setting(
        "number that Adam adds to the denominator", default=Entry(1e-8, TORCH), low=0
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """Check that there are two decays below 1."""
        super().check(run)
        if len(self.adam_betas) != 2 or max(self.adam_betas) >= 1:
            raise UsageError(
                f"adam_betas must be two numbers below 1, such as 0.9 0.999, got {self.adam_betas}"
            )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of torch's optimizer."""
        return {"betas": self.adam_betas, "eps": self.adam_eps}

    def optimizer(self, kind: type[Adam], inputs: OptimizerInputs) -> Adam:
        """Create the optimizer.

        Args:
            kind: its class.
            inputs: inputs from which it is built.
        """
        return kind(
            inputs.parameters, lr=inputs.lr, weight_decay=inputs.weight_decay, **self.arguments()
        )


register_base_optimizer(
    BaseOptimizer(
        name="adam",
        build=lambda settings, inputs: settings.optimizer(Adam, inputs),
        settings=AdamSettings,
        shards=True,
        summary="Adam; the weight decay is an L2 penalty",
        recipe=layer(f"{TORCH}; not tuned", known=False, lr=1e-3, weight_decay=0.0),
    )
)
