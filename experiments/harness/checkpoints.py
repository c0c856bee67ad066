"""Checkpoints with Orbax. A run that was stopped at any moment continues from one to the same result, bit for bit.

A folder belongs to one configuration, stored in its config.json, and contains a folder for each network. Orbax writes a
checkpoint to a temporary folder and renames it when it is complete. Later damage is detected by checksums of its files,
which are stored with them.
"""

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from experiments.harness import runtime
from experiments.harness.data import Dataset, InputError

ELSEWHERE = ("preset", "runtime", "data_dir", "out")
"""Fields of an experiment that do not define its result: devices, folders, and the preset, which sets other fields. The
data are identified by a checksum."""

SUMS = "sha256.json"
"""The file of a checkpoint that is written last."""
UNFINISHED = f"it has no {SUMS}: the run was stopped while it was written"


def claim(config: Any, experiment: str, dataset: Dataset) -> Path | None:
    """The folder of this experiment's checkpoints, marked by the configuration, or None without checkpoints.

    Raises:
      InputError: if the folder belongs to another configuration, or the processes of this run have different ones.
    """
    identity = {
        "experiment": experiment,
        **{name: value for name, value in asdict(config).items() if name not in ELSEWHERE},
        "dataset": dataset.name,
        "dataset_sha256": dataset.sha256(),
    }
    text = json.dumps(identity, indent=2, default=str)
    if not runtime.same_everywhere(hashlib.sha256(text.encode()).digest()):
        here = json.dumps(json.loads(text))
        raise InputError(f"The processes of this run have different configurations or data; this one has {here}.")
    if config.runtime.checkpoint_dir is None:
        return None
    folder = config.runtime.checkpoint_dir.absolute() / experiment
    path = folder / "config.json"
    if path.is_file():
        _check_identity(path, json.loads(text))
    elif folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"checkpoint_dir: {folder} holds files, but no config.json. Pass a new folder, or delete it.")
    multihost_utils.sync_global_devices("read config.json")
    if runtime.is_primary() and not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, text)
    return folder


def _check_identity(path: Path, wanted: dict[str, Any]) -> None:
    try:
        found = dict(json.loads(path.read_text()))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}). Restore the file, or pass a new checkpoint_dir.") from error
    different = [
        f"{name}: {found.get(name)} there, {wanted.get(name)} here"
        for name in wanted | found
        if found.get(name) != wanted.get(name)
    ]
    if different:
        raise InputError(
            f"checkpoint_dir: {path.parent} belongs to another configuration ({'; '.join(different)}). "
            "Pass that configuration, or another folder."
        )


class Checkpoints:
    """The checkpoints of one network: all variables of training, and a JSON record."""

    def __init__(self, folder: Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self.folder, self.manager = folder, ocp.CheckpointManager(folder, options=options)

    def save(self, step: int, variables: Any, record: Any) -> None:
        """Save both as the newest checkpoint, and delete the oldest beyond the number to keep."""
        self.manager.save(
            step,
            args=ocp.args.Composite(variables=ocp.args.StandardSave(variables), record=ocp.args.JsonSave(record)),
        )
        if runtime.is_primary():
            _write(self.folder / str(step) / SUMS, json.dumps(_sums(self.folder / str(step)), indent=2))

    def restore(self, like: Any) -> tuple[int, Any, Any] | None:
        """Step, variables and record of the newest undamaged checkpoint, or None if there is no checkpoint.

        Newer, damaged checkpoints are reported by a warning and renamed, with `.damaged` after their names.

        Args:
          like: variables with the structure, shapes and shardings of the restored ones.

        Raises:
          InputError: if all checkpoints are damaged, or the processes find different ones.
        """
        found, reasons = None, {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            path = self.folder / str(step)
            try:
                reasons[path] = _damage(path)
                if not reasons[path]:
                    found = step, *self._read(step, like)
                    del reasons[path]
                    break
            except Exception as error:  # Orbax and TensorStore raise exceptions of many types for damaged files
                reasons[path] = (str(error).splitlines() or [type(error).__name__])[0]
        if not runtime.same_everywhere(np.int64(found[0] if found else -1).tobytes()):
            raise InputError(f"checkpoint_dir: {self.folder} is not the same in all processes. Pass a shared folder.")
        if not found and any(reason != UNFINISHED for reason in reasons.values()):
            damage = "; ".join(f"{path}: {reason}" for path, reason in reasons.items())
            raise InputError(f"checkpoint_dir: no checkpoint can be read ({damage}). Pass a new folder to start anew.")
        for path, reason in reasons.items():
            instead = f"Step {found[0]} is used" if found else "There is no other: training starts anew"
            warnings.warn(f"{path}: damaged checkpoint ({reason}). {instead}.", stacklevel=2)
            if runtime.is_primary():  # otherwise the next checkpoint of this step could not be written
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        if reasons:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self.manager.reload()
        return found

    def _read(self, step: int, like: Any) -> tuple[Any, Any]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        content = self.manager.restore(
            step, args=ocp.args.Composite(variables=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore())
        )
        return content["variables"], content["record"]


def _damage(checkpoint: Path) -> str:
    """The damage to the files of a checkpoint, or an empty text. Orbax itself would read some changed bytes without an
    error."""
    if not (checkpoint / SUMS).is_file():
        return UNFINISHED
    expected, actual = json.loads((checkpoint / SUMS).read_text()), _sums(checkpoint)
    wrong = [name for name in sorted(expected | actual) if expected.get(name) != actual.get(name)]
    return f"{len(wrong)} of its files changed or missing: {wrong[0]}" if wrong else ""


def _sums(checkpoint: Path) -> dict[str, str]:
    """The checksums of all files of a checkpoint, by path."""
    return {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != SUMS
    }


def _write(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    # Not in the folder, which must stay empty until the file is complete.
    unfinished = path.parent.with_name(f"{path.parent.name}.{path.name}")
    unfinished.write_text(text + "\n")
    os.replace(unfinished, path)
