"""The run folder: what a job has done so far, written so that it can be stopped at any moment."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from torch import nn

from wgates_plugin.errors import FileFormatError, FileInUseError, RunFolderError
from wgates_plugin.file_claim import Claim, claim
from wgates_plugin.files import atomic_path, raw_bytes, read_json, write_json
from wgates_plugin.training.as_found import random_state_kept, seed_epoch

T = TypeVar("T")

LOCK = ".lock"
"""File by whose claim two processes keep out of each other's way."""

BEFORE_THE_RUN = {"dense.safetensors"}
"""What may lie in a folder that no run has claimed yet: the trained network to be pruned."""


class RunFolder:
    """A folder of finished stages. Each is one file that appears whole or not at all.

    With several processes only rank 0 computes and writes; the others wait and read.
    """

    def __init__(self, path: str | Path, fabric: Fabric) -> None:
        self.path = Path(path).expanduser()
        self.fabric = fabric
        self._claim: Claim | None = None

    def file(self, name: str) -> Path:
        return self.path / name

    def stage_file(self, name: str) -> Path:
        return self.path / "stages" / name

    @property
    def is_writer(self) -> bool:
        return self.fabric.global_rank == 0

    def claim(self, identity: dict[str, Any], *, resume: bool, untold: Iterable[str] = ()) -> None:
        """Start the folder for the job described by `identity`, or take it up again.

        Args:
            untold: what `identity` cannot tell from something else; with it nothing is resumed.

        Raises:
            RunFolderError: it holds another job, or a job and `resume` was not asked for.
        """
        identity = json.loads(json.dumps(identity))
        path = self.file("run.json")
        problem = None
        if self.is_writer:
            problem = self._claim_problem(identity, path, resume, ", ".join(untold))
            problem = problem or self._held_by_others()
            if problem is None and not path.exists():
                write_json(path, identity)
        problem = self.fabric.broadcast(problem)
        if problem:
            raise RunFolderError(problem)

    def hold(self) -> None:
        """Make the folder, and keep other processes out of it as long as this object lives.

        Raises:
            RunFolderError: it cannot be written to, or another process is at work in it.
        """
        problem = self.fabric.broadcast(self._held_by_others() if self.is_writer else None)
        if problem:
            raise RunFolderError(problem)

    def _held_by_others(self) -> str | None:
        """Why this process cannot work here; None once it has the folder for itself, or where all work
        is done: that is only read, if need be from a disk that cannot be written to."""
        if self.file("report.json").exists():
            return None
        lock = self.file(LOCK)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.touch()
            self._claim = claim(lock)
        except FileInUseError:
            return (
                f"run folder `{self.path}`: another process is at work in it; wait until that one has "
                "ended, or choose another folder"
            )
        except OSError as error:
            return f"run folder `{self.path}`: cannot be written to ({error}); choose another path"
        return None

    def _claim_problem(
        self, identity: dict[str, Any], path: Path, resume: bool, untold: str
    ) -> str | None:
        if self.path.exists() and not self.path.is_dir():
            return f"run folder `{self.path}`: is a file; choose another path"
        if not path.exists():
            # Hidden files are what a kill in mid-write leaves behind.
            present = self.path.iterdir() if self.path.exists() else ()
            if {p.name for p in present if not p.name.startswith(".")} - BEFORE_THE_RUN:
                return (
                    f"run folder `{self.path}`: holds files but no run.json; choose an empty or "
                    "new folder"
                )
            return None
        try:
            found = read_json(path, kind="run description")
        except FileFormatError as error:
            return f"run folder `{self.path}`: {error}"
        if not isinstance(found, dict):
            return (
                f"run folder `{self.path}`: run.json is no run description; choose another folder"
            )
        changed = differences(found, identity)
        if changed:
            return another_run(self.path, changed)
        if not resume:
            return (
                f"run folder `{self.path}`: already holds this run; resume it (`resume=True`, "
                "`--resume`) or choose another folder"
            )
        if untold:
            return (
                f"run folder `{self.path}`: cannot be resumed, since whether the option {untold} is "
                "the one it was begun with cannot be told; give a function that a module holds, or "
                "an object that can be pickled, and start anew in another folder"
            )
        return None

    def once(self, name: str, compute: Callable[[], T], *, leaves: str | None = None) -> T:
        """The stored JSON value of stage `name`, computed by rank 0 when it is not there yet.

        Args:
            leaves: the checkpoint that the stage writes; without it the stage is done again.
        """
        path = self.stage_file(f"{name}.json")
        failure: BaseException | None = None
        whole = path.exists() and (leaves is None or self.stage_file(leaves).exists())
        if self.is_writer and not whole:
            try:
                with self.clock(name):
                    value = compute()
                write_json(path, value)
            except Exception as error:
                failure = error
        failed = self.fabric.broadcast(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if failed is not None:
            raise RunFolderError(f"stage `{name}` failed on rank 0: {failed}")
        result: T = read_json(path, kind=f"stage `{name}`")
        return result

    def stage(self, name: str) -> Any:
        """The stored value of a finished stage, None when it is not there."""
        path = self.stage_file(f"{name}.json")
        return read_json(path, kind=f"stage `{name}`") if path.exists() else None

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Add the block's wall time to the phase, over all sittings of the run."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.is_writer:
                seconds = self.seconds()
                seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started
                write_json(self.stage_file("seconds.json"), seconds)

    def seconds(self) -> dict[str, float]:
        path = self.stage_file("seconds.json")
        found: dict[str, float] = read_json(path, kind="phase times") if path.exists() else {}
        return found

    def save_state(self, name: str, state: dict[str, Any]) -> None:
        """Write a checkpoint of tensors and plain values (rank 0 only)."""
        if self.is_writer:
            with atomic_path(self.stage_file(name)) as part:
                torch.save(state, part)

    def load_state(self, name: str) -> dict[str, Any] | None:
        """The checkpoint called `name`, or None when there is none yet.

        Raises:
            FileFormatError: it is corrupt.
        """
        path = self.stage_file(name)
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:
            raise FileFormatError(
                f"checkpoint `{path}`: cannot be read ({type(error).__name__}); delete it to repeat "
                "its phase from the beginning"
            ) from error
        return state


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """What differs between two JSON values, as "`key` was OLD, is NEW", with dotted keys.

    >>> differences({"seed": 0, "data": {"limit": 64}}, {"seed": 0, "data": {"limit": 128}})
    ['`data.limit` was 64, is 128']
    """
    if before == now:
        return []
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = ({str(n): item for n, item in enumerate(part)} for part in (before, now))
    if isinstance(before, dict) and isinstance(now, dict) and before and now:
        return [
            line
            for inner in sorted({*before, *now})
            for line in differences(
                before.get(inner), now.get(inner), f"{key}.{inner}" if key else inner
            )
        ]
    return [f"`{key}` was {_shown(before)}, is {_shown(now)}"]


def _shown(value: Any) -> str:
    words = "not given" if value is None else json.dumps(value)
    return words if len(words) <= 80 else words[:77] + "..."


def another_run(folder: Path, changed: list[str]) -> str:
    """The refusal of a run folder because of `differences`."""
    return (
        f"run folder `{folder}`: belongs to another run (different: {'; '.join(changed)}); choose "
        "another folder (`samples_file` takes its `samples.jsonl`, which spares LPNet's measurements, "
        "and `model.weights` of a recipe its `dense.safetensors`), or resume (`resume=True`, "
        "`--resume`) with the network, data, target, settings, loss, processor and library versions it "
        "was begun with"
    )


def weights_digest(network: nn.Module) -> str:
    """Short hash of all weights and buffers: tells whether a run is resumed on the same network."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()[:16]


def first_batch_digest(loader: Iterable[Any]) -> str:
    """Short hash of a loader's first batch: tells whether a run is resumed on the same data.

    All random states, a generator of the loader's own included, are given back.
    """
    cpu = torch.device("cpu")
    with random_state_kept(cpu, loader):
        seed_epoch(0, 0, cpu, loader)
        batch = next(iter(loader), None)
    digest = hashlib.sha256()
    pending: list[Any] = [batch]
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            digest.update(raw_bytes(value))
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (tuple, list)):
            pending += value
    return digest.hexdigest()[:16]
