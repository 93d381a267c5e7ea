"""Fused SAM and Lanczos kernels on raw addresses (integers); fastsam.kernels is their validating face."""

from typing import Any

from typing_extensions import Buffer

TABLE_COLUMNS: tuple[str, ...]
HYPER_COLUMNS: tuple[str, ...]
ADAPTIVE: int
STOCHASTIC: int

def build_info() -> dict[str, Any]: ...

class Execution:
    def __init__(self, device: int, stream: int, threads: int) -> None: ...

class SamScalars:
    def __init__(
        self,
        *,
        hyper: int,
        group_count: int,
        squared_norms: int,
        norm_count: int,
        found_inf: int,
        grad_scale: int = 0,
        skipped_steps: int = 0,
        unchanged: int = 0,
    ) -> None: ...

class LanczosStep:
    def __init__(
        self,
        *,
        rows: int,
        probe_stride: int,
        row_stride: int,
        vector: int,
        successor: int,
        successor_stride: int,
        probes: int,
        count: int,
        size: int,
        step: int,
        eps: float,
    ) -> None: ...

class Recurrence:
    def __init__(
        self, *, alpha: int, beta: int, bound: int, active: int, steps_taken: int, steps: int
    ) -> None: ...

class _Backend:
    def sam_scratch_bytes(self, table: Buffer) -> int: ...
    def sam_norm(
        self,
        execution: Execution,
        dtype: int,
        table: Buffer,
        hyper: int,
        squared_norm: int,
        scratch: int,
    ) -> None: ...
    def sam_perturb(
        self, execution: Execution, dtype: int, table: Buffer, scalars: SamScalars
    ) -> None: ...
    def sam_check(
        self, execution: Execution, dtype: int, table: Buffer, found_inf: int
    ) -> None: ...
    def sam_restore(self, execution: Execution, dtype: int, table: Buffer) -> None: ...
    def sam_update_sgd(
        self, execution: Execution, dtype: int, table: Buffer, scalars: SamScalars, scratch: int
    ) -> None: ...
    sam_update_adam = sam_update_sgd
    def add_noise(
        self, execution: Execution, dtype: int, table: Buffer, seed_and_step: int
    ) -> None: ...
    def orthogonalize_scratch_bytes(self, probes: int, count: int, size: int) -> int: ...
    def orthogonalize(
        self,
        execution: Execution,
        dtype: int,
        step: LanczosStep,
        recurrence: Recurrence,
        scratch: int,
    ) -> None: ...

cpu: _Backend
cuda: _Backend  # absent from a build without CUDA
