"""Metadata of model files: strings by name."""

from __future__ import annotations

import json
from typing import Any

import fastsam
from fastsam.longtail.config import TrainConfig, find_setting, place_settings
from fastsam.longtail.settings import Entry
from fastsam.longtail.trained.run import TrainedRun


def metadata(run: TrainedRun) -> dict[str, str]:
    """Describe a run for the header of a model file.

    Returns:
        ``fastsam`` (version), ``architecture``, ``head``, ``channels``, and as JSON ``size`` (height and
        width of the network's input; ``null`` if unknown), ``classes`` (names in the order of labels),
        ``counts`` (training images of each class), ``preprocessing`` (see
        :class:`~fastsam.longtail.data.Preprocessing`; ``null`` if unknown) and ``config`` (settings; see
        :func:`portable_settings`).
    """
    config = run.checkpoint.config
    preprocessing = run.preprocessing
    return {
        "fastsam": fastsam.__version__,
        "architecture": config.model,
        "head": config.head,
        "channels": str(run.checkpoint.channels),
        "size": json.dumps(run.checkpoint.size),
        "classes": json.dumps(list(run.class_names)),
        "counts": json.dumps(run.counts.tolist()),
        "preprocessing": json.dumps(None if preprocessing is None else preprocessing.as_dict()),
        "config": json.dumps(portable_settings(config)),
    }


def portable_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the stored form of the settings, with settings of the machine reset to their defaults."""
    values = config.as_dict()
    for name in values.keys() & set(place_settings()):
        default = find_setting(name)[0].metadata["default"]
        del values[name]
        if isinstance(default, Entry):
            values[name] = default.value
    return values
