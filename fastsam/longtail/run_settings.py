"""Settings that every training run has, whatever its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastsam.distributed import TIMEOUT
from fastsam.longtail.data.augmentations import AUGMENTATIONS
from fastsam.longtail.data.catalog import DATASETS
from fastsam.longtail.mixers import MIXERS
from fastsam.longtail.models.base import MODELS
from fastsam.longtail.models.classifier import BatchNormMode
from fastsam.longtail.models.heads import HEADS
from fastsam.longtail.named_recipes import NAMED_RECIPES, STANDARD
from fastsam.longtail.optimizers.base import OPTIMIZERS
from fastsam.longtail.precision import Precision
from fastsam.longtail.schedules import LR_SCHEDULES
from fastsam.longtail.settings import Settings, setting
from fastsam.longtail.sharding import Parallel
from fastsam.longtail.stages.base import STAGES
from fastsam.longtail.tunings import TUNINGS

Selection = Literal["last", "best-validation"]


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """Settings of the run itself; those of its parts belong to the parts."""

    data: str = setting("data set", names=DATASETS)
    method: str = setting("method, LOSS or LOSS-RULE, for instance ce, ce-drw, ldam-drw or vs")
    optimizer: str = setting("optimizer", names=OPTIMIZERS)

    recipe: str = setting(
        "published settings from which the run takes what is not passed",
        default=STANDARD,
        before=STANDARD,
        names=NAMED_RECIPES,
    )
    stages: str = setting(
        "list of training stages. Each stage after the first starts from the weights of an earlier one; the "
        "options are the settings of the first stage, and those of later stages as far as the list does not "
        "set them",
        default="none",
        before="none",
        names=STAGES,
    )
    model: str = setting("network", names=MODELS)
    head: str = setting(
        "classification head",
        default="linear",
        default_text="linear, or the head that the loss requires",
        names=HEADS,
    )
    init: str | None = setting(
        "weights to start from: folder of a run, its checkpoint, or a file with a state dict (torch or "
        "safetensors). Training begins in epoch 1",
        optional=True,
        default_text="random initial weights",
    )
    head_from: str | None = setting(
        "initial weights of the head: class-means (of the features of the training images), fresh (random, "
        "also with --init), or a file with one vector per class, [C, D] (.npy, .pt or .safetensors)",
        optional=True,
        default_text="those of --init if they fit, else random",
    )
    tune: str = setting(
        "part of the network that is trained, together with the head. A tuning may add small modules",
        default="all",
        before="all",
        names=TUNINGS,
    )
    freeze: tuple[str, ...] = setting(
        "parameters that are not trained, as patterns of their names, such as 'features.*'",
        default=(),
        default_text="none",
        before=(),
    )
    batch_norm: BatchNormMode = setting(
        "batch normalization in training: train; frozen (the stored statistics are used and not updated, and "
        "scale and shift are not trained); or statistics (scale and shift are not trained)",
        default="train",
        before="train",
    )
    epochs: int = setting("number of epochs", low=1, high=10**6)
    batch_size: int = setting("images per batch, over all processes", low=1, high=2**31 - 1)
    augment: str = setting(
        "augmentation of the training images",
        default="default",
        names=AUGMENTATIONS,
        former={"True": "default", "False": "none"},
    )
    mixer: str = setting(
        "how to combine each image of a batch with another image and its class",
        default="none",
        before="none",
        names=MIXERS,
    )

    lr: float = setting("learning rate after warm-up", above=0)
    weight_decay: float = setting(
        "weight decay of all parameters: an L2 penalty with sgd and adam, decoupled with adamw",
        low=0,
    )
    warmup_epochs: int = setting(
        "epochs of linear learning-rate warm-up: lr * epoch / warmup_epochs", low=0, scaled=0
    )
    lr_schedule: str = setting("learning-rate schedule after warm-up", names=LR_SCHEDULES)

    lr_scale: tuple[str, ...] = setting(
        "factors on the learning rate of parameters, as PATTERN=FACTOR, such as 'features.*=0.1'. The last "
        "pattern that matches a name counts",
        default=(),
        default_text="1 everywhere",
        before=(),
    )
    layer_decay: float = setting(
        "factor on the learning rate from each layer (block) of the network to the one below; the head has "
        "factor 1",
        default=1.0,
        before=1.0,
        above=0,
        high=1,
    )
    no_decay: tuple[str, ...] = setting(
        "parameters without weight decay, as patterns of their names. The pattern vectors selects biases "
        "and the scales and shifts of normalization layers",
        default=(),
        default_text="none",
        before=(),
    )
    max_norm: tuple[str, ...] = setting(
        "largest Euclidean norm of each class vector or filter, as PATTERN=NORM, such as 'head.weight=1'. "
        "Longer ones are scaled back after every step; biases are not limited. PATTERN=range:SHARE sets it "
        "from the weights before the first step: the smallest norm plus SHARE of the range of the norms",
        default=(),
        default_text="no limit",
        before=(),
    )

    select: Selection = setting(
        "weights to evaluate: last (of the last epoch) or best-validation (of the epoch with the highest "
        "balanced accuracy on the validation set)",
        default="last",
        before="last",
    )
    validate_every: int = setting(
        "evaluate on the validation set every N epochs, and after the last epoch",
        default=1,
        before=1,
        low=1,
    )
    ema: float | None = setting(
        "decay of an exponential moving average of weights and running statistics, at least 0 and below 1, "
        "updated after every step. The average is evaluated; 0 evaluates the trained weights themselves",
        optional=True,
        default_text="no average",
        low=0,
    )
    posthoc_tau: float = setting(
        "tau of the post-hoc logit adjustment: tau * log prior is subtracted from logits at test time",
        default=0.0,
        before=0.0,
        low=-1000,
        high=1000,
    )
    seed: int = setting(
        "seed of initial weights, batch order and augmentation",
        default=0,
        before=0,
        low=0,
        high=2**63 - 1,
    )
    precision: Precision = setting(
        "precision of the passes of training and evaluation: float32, bfloat16 or float16 (autocast), or "
        "auto. float16 scales the loss. auto is decided once, by the device: bfloat16 on a GPU of compute "
        "capability 8.0 or higher and on a CPU with AMX, float16 on a GPU of capability 7.x, else float32",
        default="float32",
        before="float32",
    )
    tf32: bool | None = setting(
        "round the factors of float32 matrix products and convolutions to TF32, on an NVIDIA GPU; False "
        "rounds neither",
        optional=True,
        default_text="PyTorch's own setting, which rounds in convolutions only",
    )
    channels_last: bool = setting(
        "use the channels-last memory format (torch.channels_last) for images and filters. It speeds up "
        "bfloat16 convolutions on a GPU and often convolutions on a CPU",
        default=False,
        before=False,
    )
    accumulate: int = setting(
        "micro-batches per pass: each holds the activations of 1/INT of a process's part of the batch. Batch "
        "normalization uses the statistics of a micro-batch",
        default=1,
        before=1,
        low=1,
        high=10**6,
    )
    parallel: Parallel = setting(
        "how several processes hold the network: ddp (each all of it, DistributedDataParallel) or fsdp2 "
        "(each a part of every weight, gradient and optimizer state)",
        default="ddp",
        before="ddp",
        place=True,
    )
    sync_batch_norm: bool = setting(
        "normalize with the statistics of all processes' parts of a batch (torch.nn.SyncBatchNorm, on GPUs "
        "only), not with those of one part",
        default=False,
        before=False,
    )
    compile: bool = setting(
        "compile the passes of training with torch.compile. The results differ from those without it by "
        "rounding; the first steps take seconds to minutes longer",
        default=False,
        before=False,
    )
    checkpoint_activations: bool = setting(
        "store only the inputs of residual blocks, and compute their activations again in the backward "
        "pass: less memory, more computation, and the same gradients",
        default=False,
        before=False,
    )
    device: str = setting("device: cpu, cuda, cuda:1, ...", default="cpu", before="cpu", place=True)
    rank_timeout: float = setting(
        "seconds after which a run on several processes fails if one of them does not take part in a "
        "collective operation",
        default=TIMEOUT,
        before=TIMEOUT,
        low=1,
        high=10**7,
        place=True,
    )
    checkpoint_steps: int | None = setting(
        "also write checkpoints within an epoch, so often that a killed run repeats at most INT steps: every "
        "INT/2 steps, because training continues while one is written",
        optional=True,
        default_text="no limit",
        low=1,
        place=True,
    )
    checkpoint_minutes: float = setting(
        "also write a checkpoint within an epoch if the last one is older than this many minutes; 0 writes "
        "them only at the end of epochs",
        default=10.0,
        before=10.0,
        low=0,
        high=10**6,
        place=True,
    )
    keep_last: int = setting(
        "number of newest checkpoints to keep for resuming. If one is damaged, the one before is used",
        default=2,
        before=2,
        low=1,
        high=1000,
        place=True,
    )
    threads: int = setting(
        "number of CPU threads; with 0, PyTorch chooses it", default=0, before=0, low=0, high=1024
    )

    track_curvature: int | None = setting(
        "measure the largest and smallest Hessian eigenvalue every INT steps; this does not change training",
        optional=True,
        default_text="no measurement",
        low=1,
        place=True,
    )
    curvature_classes: tuple[str, ...] = setting(
        "classes that track_curvature measures separately: labels, groups (head, mid, tail), or all",
        default=("head", "tail"),
        before=("head", "tail"),
        place=True,
    )
    curvature_images: int = setting(
        "number of training images of each of curvature_classes, without augmentation, drawn once",
        default=64,
        before=64,
        low=1,
        place=True,
    )
    curvature_budget: float = setting(
        "largest share of the training time that track_curvature may take. With a limit, the measured steps "
        "depend on the speed of the machine; 0 removes the limit",
        default=0.05,
        before=0.05,
        low=0,
        place=True,
    )
