"""The record of a run in stages, from which it is continued without its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsam import files
from fastsam.files import write_text
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.differences import differences
from fastsam.longtail.errors import CheckpointError
from fastsam.longtail.run_file import run_file_text
from fastsam.longtail.stage_plan import stages_as_list, stages_from
from fastsam.longtail.stages import STAGES, register_stages
from fastsam.longtail.stages.base import OWN
from fastsam.longtail.training.run_folder import RunFolder

FORMAT = 1


@dataclass(frozen=True)
class StageRecord:
    """The settings of a run in stages, before its list changes them.

    Attributes:
        config: settings of the run.
        sources: source of each setting, by name.
        from_stage: folder of the run that is the first stage; None if the run trains it.
        keep: epochs of the first stage whose checkpoint is kept.
        own: the list of stages as plain values if a file or a program defined it.
    """

    config: TrainConfig
    sources: dict[str, str] = field(default_factory=dict)
    from_stage: str | None = None
    keep: tuple[int, ...] = ()
    own: list[dict[str, Any]] | None = None

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        sources: dict[str, str],
        *,
        from_stage: str | None = None,
        keep: tuple[int, ...] = (),
    ) -> StageRecord:
        """Return the record of a run whose list is registered."""
        name = config.stages
        own = stages_as_list(STAGES[name]) if name.startswith(OWN) else None
        return cls(config, sources, from_stage, keep, own)

    def register(self) -> None:
        """Register the list of stages if a file or a program defined it."""
        if self.own is not None:
            register_stages(stages_from(self.config.stages.removeprefix(OWN), self.own))

    def differs(self, stored: StageRecord) -> bool:
        """Return whether a stored record repeats another run; where it is executed does not count."""
        changed = differences(stored.config.as_dict(), self.config.as_dict())
        return bool(changed) or (self.own, self.keep) != (stored.own, stored.keep)

    def changes_first(self, stored: StageRecord) -> bool:
        """Return whether a list that a file or a program defines sets other values in its first stage."""
        both = self.own is not None and stored.own is not None
        return both and self.own[:1] != stored.own[:1]  # type: ignore[index]

    def write(self, out: str | Path, *, processes: int = 1) -> None:
        """Write ``stages.json`` and ``run.yaml``, which repeats all stages; the caller holds the lock.

        Args:
            out: folder of the run.
            processes: number of processes that train the run.
        """
        folder = RunFolder(out)
        document = {
            "format": FORMAT,
            "settings": self.config.as_dict(),
            "sources": self.sources,
            "from_stage": self.from_stage,
            "keep": list(self.keep),
            "list": self.own,
        }
        write_text(folder.stages, files.to_json(document))
        options = {"stages": self.own, "from_stage": self.from_stage, "keep": list(self.keep)}
        text = run_file_text(self.config, self.sources, options=options, processes=processes)
        write_text(folder.settings, text)

    @classmethod
    def read(cls, out: str | Path) -> StageRecord | None:
        """Read the record of the run in a folder; return None if there is none.

        Raises:
            CheckpointError: if the file is damaged or was edited.
        """
        path = RunFolder(out).stages
        try:
            found = files.from_json(path.read_text("utf-8"))
            if found.get("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT}, got {found.get('format')!r:.20}")
            config = TrainConfig.from_dict(found["settings"])
            if found["list"] is not None:
                stages_from(config.stages.removeprefix(OWN), found["list"])  # raises: it was edited
            keep = tuple(int(epoch) for epoch in found["keep"])
            return cls(config, dict(found["sources"]), found["from_stage"], keep, found["list"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not the record of a run in stages that this version of fastsam wrote: {error}. "
                "Remove it and pass the options of the run with --resume auto"
            ) from error
