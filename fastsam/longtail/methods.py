"""Methods, named ``loss[-rule]``: which loss, and how rare classes are favoured."""

from __future__ import annotations

from dataclasses import dataclass

from fastsam.longtail.errors import UsageError

LOSSES: dict[str, str] = {
    "ce": "cross-entropy",
    "focal": "focal loss",
    "ldam": "label-distribution-aware margin loss on cosine logits",
    "vs": "vector-scaling loss",
    "cdt": "class-dependent temperatures (VS loss with tau = 0)",
    "la": "logit-adjusted loss (VS loss with gamma = 0)",
    "bs": "balanced softmax (logit adjustment with tau = 1)",
    "eql": "softmax equalization loss",
    "paco": "parametric contrastive learning with momentum encoder and queue",
    "ib": "influence-balanced loss; cross-entropy before the deferral epoch",
}

RULES: dict[str, str] = {
    "none": "every image counts once",
    "rw": "re-weight the loss by class",
    "drw": "re-weight from the deferral epoch on",
    "rs": "re-sample: draw rare classes more often",
    "drs": "re-sample from the deferral epoch on",
}


@dataclass(frozen=True)
class Method:
    """A loss and a rule.

    Attributes:
        loss: one of :data:`LOSSES`.
        rule: one of :data:`RULES`.
    """

    loss: str
    rule: str = "none"

    @classmethod
    def parse(cls, name: str) -> Method:
        """Read ``loss`` or ``loss-rule``.

        Raises:
            UsageError: naming the valid losses and rules.

        Example:
            >>> Method.parse("ldam-drw")
            Method(loss='ldam', rule='drw')
        """
        loss, _, rule = name.partition("-")
        rule = rule or "none"
        if loss not in LOSSES or rule not in RULES or name.endswith("-"):
            raise UsageError(
                f"unknown method {name!r}; a method is loss or loss-rule, with loss one of "
                f"{', '.join(LOSSES)} and rule one of {', '.join(RULES)}"
            )
        if loss in ("ib", "paco") and rule in ("rw", "drw"):
            raise UsageError(f"{name}: the loss {loss} balances classes by itself")
        return cls(loss, rule)

    @property
    def name(self) -> str:
        """The method as it is written on the command line."""
        return self.loss if self.rule == "none" else f"{self.loss}-{self.rule}"

    @property
    def weighted(self) -> bool:
        """Whether class weights enter the loss at some time."""
        return self.rule in ("rw", "drw")

    @property
    def resampled(self) -> bool:
        """Whether classes are re-sampled at some time."""
        return self.rule in ("rs", "drs")

    @property
    def deferred(self) -> bool:
        """Whether something changes at the deferral epoch."""
        return self.rule in ("drw", "drs") or self.loss == "ib"
