"""A data set as a plug-in, from PyTorch datasets whose items are (image, label)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastsam.longtail.data import (
    DataSetPart,
    LongTailData,
    from_datasets,
    longtail_counts,
    register_dataset,
)
from fastsam.longtail.settings import Entry, Settings, layer, setting


class Stripes(Dataset):
    """Noisy stripes of 12x12 pixels; the class is their direction."""

    classes = ("horizontal", "vertical", "diagonal")

    def __init__(self, counts: list[int], *, noise: float, seed: int) -> None:
        self.targets = [label for label, count in enumerate(counts) for _ in range(count)]
        generator = torch.Generator().manual_seed(seed)
        self.noise = noise * torch.randn(len(self.targets), 1, 12, 12, generator=generator)
        self.shifts = torch.randint(4, (len(self.targets),), generator=generator)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        row, column = torch.arange(12)[:, None], torch.arange(12)[None]
        label = self.targets[place]
        phase = (row + 0 * column, column + 0 * row, row + column)[label]
        stripes = ((phase + self.shifts[place]) % 4 < 2).float()
        return stripes[None] + self.noise[place], label


@dataclass(frozen=True, kw_only=True)
class StripesSettings(Settings):
    """Settings of the data set."""

    stripes_noise: float = setting(
        "standard deviation of the noise", default=Entry(0.5, "an example"), low=0
    )


def _load(settings: StripesSettings, progress: bool) -> LongTailData:
    counts = longtail_counts(40, 3, 10).tolist()
    return from_datasets(
        "stripes",
        Stripes(counts, noise=settings.stripes_noise, seed=0),
        Stripes([20, 20, 20], noise=settings.stripes_noise, seed=1),
        validation=Stripes([5, 5, 5], noise=settings.stripes_noise, seed=2),
        mean=(0.5,),
        std=(0.5,),
    )


register_dataset(
    DataSetPart(
        name="stripes",
        build=_load,
        settings=StripesSettings,
        summary="stripes of three directions",
        where="install the plug-in, which generates it",
        recipe=layer("an example", model="resnet8", epochs=10, batch_size=16, lr=0.05),
    )
)
