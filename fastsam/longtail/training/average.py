"""The weights that a run judges: those of the last epoch, of an average over steps, or of the best epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastsam.distributed import World
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.models import Classifier
from fastsam.longtail.results import Epoch, best_epoch, judged_rule


class JudgedWeights:
    """Follows the weights of a run and keeps those that its result judges.

    With ``ema`` these are an exponential average, ``a <- decay * a + (1 - decay) * w`` after every step, of
    weights and buffers, running statistics included. It begins at the weights with which training begins, in
    a branch those of the kept epoch. A skipped step counts: it averages in the weights that it left
    unchanged. Without ``ema`` they are the weights themselves.

    Args:
        network: the network that is trained.
        config: settings of the run.

    Attributes:
        network: the network to judge: that of the average, or the trained one.
        best: its state after the best epoch on validation so far, where the run selects that.
    """

    def __init__(self, network: Classifier, config: TrainConfig) -> None:
        self.best: dict[str, Any] | None = None
        self._trained = network
        self._selects = config.select != "last"
        self._decay = config.ema
        self._average: AveragedModel | None = None
        self.network = network
        if config.ema is not None:
            mean = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
            self._average = AveragedModel(network, multi_avg_fn=mean, use_buffers=True)
            self._average.update_parameters(network)  # the first call copies
            self.network = cast(Classifier, self._average.module)

    @property
    def average(self) -> dict[str, Any] | None:
        """State of the averaged network; None in runs without ``ema``."""
        return None if self._average is None else self.network.state_dict()

    def continue_from(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint ended, of this run or of the one that it branches from.

        The trained network has the weights of the checkpoint already.
        """
        self.best = checkpoint.best if self._selects else None
        if self._average is not None:
            began = checkpoint.model if checkpoint.average is None else checkpoint.average
            self.network.load_state_dict(began)

    def update(self) -> None:
        """Average in the weights after a step."""
        if self._average is not None:
            self._average.update_parameters(self._trained)

    def average_statistics(self, world: World) -> None:
        """Give every process the mean of the running statistics of batch normalization.

        Processes see different images, so their statistics differ within an epoch. The average over steps is
        linear in them: the mean of the processes' averages is the average of their means.
        """
        if world.world_size == 1:
            return
        networks = [self._trained] if self._average is None else [self._trained, self.network]
        statistics = [
            value
            for network in networks
            for value in network.buffers()
            if value.is_floating_point()
        ]
        world.all_reduce(statistics)
        for value in statistics:
            value.div_(world.world_size)

    def keep_best(self, history: Sequence[Epoch]) -> None:
        """Keep the weights if the last epoch is the first of the highest validation accuracy."""
        if self._selects and best_epoch(history) == len(history):
            self.best = {name: value.clone() for name, value in self.network.state_dict().items()}

    def choose(self, history: Sequence[Epoch], parent: Mapping[str, Any] | None) -> str:
        """Load the weights that the result judges into ``network``, and return what they are.

        Args:
            history: every epoch.
            parent: the record of the run that this one branches from, which may have judged other weights.
        """
        if self.best is not None:
            self.network.load_state_dict(self.best)
        return judged_rule(history, selects=self.best is not None, decay=self._decay, parent=parent)
