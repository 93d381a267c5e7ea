"""The weights that a run evaluates: of the last epoch, of an average over steps, or of the best epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastsam.distributed import World, local_part
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.models import Classifier
from fastsam.longtail.results import Epoch, best_epoch, judged_rule
from fastsam.longtail.sharding import load_weights

_Tensors = list[Tensor] | tuple[Tensor, ...]


class JudgedWeights:
    """Maintains the weights that a run evaluates.

    With ``ema`` they are an exponential moving average of weights and buffers, including running statistics:
    ``a <- decay * a + (1 - decay) * w`` after every step. Integers, such as counters, are copied. It starts
    at the initial weights, in a branch at those of the checkpoint. A skipped step updates the average too,
    with the unchanged weights. Without ``ema`` they are the trained weights.

    Args:
        network: the network that is trained.
        config: settings of the run.

    Attributes:
        network: the network to evaluate: the average, or the trained network.
        best: state dict of ``network`` after the best epoch on validation so far; None if the run does not
            select by validation.
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

            def mean_of_parts(averages: _Tensors, values: _Tensors, count: Any) -> None:
                if not averages[0].is_floating_point():  # a group of one dtype, such as labels
                    for average, value in zip(averages, values, strict=True):
                        average.copy_(value)
                    return
                # Buffers are whole even if parameters are sharded, and torch does not mix the two.
                mean(*([local_part(v) for v in given] for given in (averages, values)), count)

            self._average = AveragedModel(network, multi_avg_fn=mean_of_parts, use_buffers=True)
            self._average.update_parameters(network)  # the first call copies
            self.network = cast(Classifier, self._average.module)

    @property
    def networks(self) -> list[Classifier]:
        """The trained network, and the average in runs with ``ema``."""
        return [self._trained] if self._average is None else [self._trained, self.network]

    @property
    def average(self) -> dict[str, Any] | None:
        """State dict of the averaged network; None in runs without ``ema``."""
        return None if self._average is None else self.network.state_dict()

    def continue_from(self, checkpoint: Checkpoint) -> None:
        """Load the state of a checkpoint, of this run or of the run that it branches from.

        The trained network must have the weights of the checkpoint already.
        """
        self.best = checkpoint.best if self._selects else None
        if self._average is not None:
            began = checkpoint.model if checkpoint.average is None else checkpoint.average
            load_weights(self.network, began)

    def update(self) -> None:
        """Update the average after a step."""
        if self._average is not None:
            self._average.update_parameters(self._trained)

    def average_statistics(self, world: World) -> None:
        """Average the running statistics of batch normalization over all ranks.

        Ranks see different images, so their statistics differ within an epoch. The moving average is linear
        in them, so the mean of the ranks' moving averages is the moving average of the mean.
        """
        if world.world_size == 1:
            return
        frozen = {
            id(value)  # the mean of equal numbers may differ from them by rounding
            for network in self.networks
            for layer in network.frozen_norms()
            for value in layer.buffers()
        }
        statistics = [
            value
            for network in self.networks
            for value in network.buffers()
            if value.is_floating_point() and id(value) not in frozen
        ]
        world.all_reduce(statistics)
        for value in statistics:
            value.div_(world.world_size)

    def keep_best(self, history: Sequence[Epoch]) -> None:
        """Store the weights if the last epoch has the highest validation score so far."""
        if self._selects and best_epoch(history) == len(history):
            self.best = {name: value.clone() for name, value in self.network.state_dict().items()}

    def choose(self, history: Sequence[Epoch], parent: Mapping[str, Any] | None) -> str:
        """Load the weights to evaluate into ``network``, and return their description.

        Args:
            history: records of all epochs.
            parent: record of the run from which this one branched off, which may average differently.
        """
        if self.best is not None:
            load_weights(self.network, self.best)
        return judged_rule(history, selects=self.best is not None, decay=self._decay, parent=parent)
