"""A run that was stopped resumes to the same result; a damaged or foreign checkpoint is rejected."""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.harness import records, train
from experiments.harness.checkpoints import Checkpoints
from experiments.harness.data import InputError

FLAGS = shlex.split("train --steps 60 --seeds 2 --eval-every 8 --hidden 8 --batch-size 50 --devices 1")
SAVING = shlex.split("--checkpoint-every 5 --checkpoint-keep 2")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}


def start(folder, out, *flags):
    command = [sys.executable, "-m", "experiments", *FLAGS, "--out", str(folder / out), *flags]
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    environment = ENVIRONMENT | compiled
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def names(folder):
    return sorted(path.name for path in folder.glob("*")) if folder.exists() else []


@pytest.mark.slow
def test_a_run_killed_at_random_moments_has_the_metrics_of_one_that_was_not(tmp_path):
    whole = start(tmp_path, "whole")
    delay, saved = random.Random(0), tmp_path / "saved" / "train"
    for network in "plain", "batch-normalization":
        stopped = start(tmp_path, "stopped", "--checkpoint-dir", str(tmp_path / "saved"), *SAVING)
        while not any(name.isdecimal() for name in names(saved / network)):
            assert stopped.poll() is None, stopped.stderr.read()
            time.sleep(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            stopped.wait(delay.uniform(0, 0.3))
        stopped.kill()
        stopped.communicate()
        assert "60" not in names(saved / network)
    resumed = start(tmp_path, "stopped", "--checkpoint-dir", str(tmp_path / "saved"), *SAVING)
    for process in resumed, whole:
        messages = process.communicate()[1]
        assert process.returncode == 0, messages
    metrics = [(tmp_path / run / "train" / "metrics.jsonl").read_bytes() for run in ("whole", "stopped")]
    assert metrics[0] == metrics[1]
    assert len(metrics[0].splitlines()) == 2 * 2 * 9  # networks, seeds, evaluations
    # A checkpoint that was cut off while it was written may still be there, set aside.
    assert [name for name in names(saved / "plain") if name.isdecimal()] == ["55", "60"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's folder, and the flags that wrote it."""
    folder = tmp_path_factory.mktemp("finished")
    flags = [*FLAGS, *SAVING, "--out", str(folder / "out"), "--checkpoint-dir", str(folder / "saved")]
    assert main(flags) == 0
    return folder, flags


def test_a_finished_run_is_not_trained_again(finished, monkeypatch):
    folder, flags = finished
    metrics = folder / "out" / "train" / "metrics.jsonl"
    before = metrics.read_bytes()
    metrics.write_text("lost")
    monkeypatch.setattr(train, "updater", None)
    assert main(flags) == 0
    assert metrics.read_bytes() == before
    assert records.read_metrics(metrics.parent)["plain"].steps.tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 60]


def test_another_configuration_is_refused_with_what_differs(finished, capsys, monkeypatch):
    _, flags = finished
    monkeypatch.setattr(train, "fit", None)
    assert main([*flags, "--learning-rate", "0.25", "--hidden", "8", "9"]) == 2
    message = capsys.readouterr().err
    assert "belongs to another configuration" in message
    assert "hidden: [8] there, [8, 9] here; learning_rate: None there, 0.25 here)" in message
    assert message.count("\n") == 1


def test_other_data_are_refused_with_what_differs(finished, capsys):
    folder, flags = finished
    path = folder / "saved" / "train" / "config.json"
    text = path.read_text()
    path.write_text(text.replace(json.loads(text)["dataset_sha256"], "0123"))
    assert main(flags) == 2
    assert "dataset_sha256: 0123 there, " in capsys.readouterr().err
    path.write_text(text[:-5])
    assert main(flags) == 2
    assert "config.json: damaged" in capsys.readouterr().err
    path.unlink()
    assert main(flags) == 2
    assert "holds files, but no config.json" in capsys.readouterr().err
    path.write_text(text)


def test_the_checkpoint_before_a_damaged_one_gives_the_same_metrics(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "saved", tmp_path / "saved")
    newest = tmp_path / "saved" / "train" / "batch-normalization" / "60"
    _damage(newest, "flipped byte")
    flags = [*FLAGS, *SAVING, "--out", str(tmp_path / "out"), "--checkpoint-dir", str(tmp_path / "saved")]
    with pytest.warns(UserWarning, match=f"{newest}: damaged checkpoint .*Step 55 is used"):
        assert main(flags) == 0
    metrics = [(run / "out" / "train" / "metrics.jsonl").read_bytes() for run in (folder, tmp_path)]
    assert metrics[0] == metrics[1]
    assert names(newest.parent) == ["55", "60", "60.damaged"]


VARIABLES = [{"kernel": np.arange(2000.0, dtype=np.float32), "n": np.int32(3)}, ()]


def _checkpoints(folder, steps):
    checkpoints = Checkpoints(folder, keep=3)
    for step in steps:
        variables = [{name: jnp.asarray(leaf) + step for name, leaf in VARIABLES[0].items()}, ()]
        checkpoints.save(step, variables, [step, 0.1, None])
    return checkpoints


def _damage(checkpoint, kind):
    data = max((path for path in (checkpoint / "variables").rglob("*") if path.is_file()), key=os.path.getsize)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    match kind:
        case "truncated file":
            os.truncate(data, len(content) // 2)
        case "flipped byte":
            data.write_bytes(content)
        case "deleted file":
            data.unlink()
        case "deleted index":
            (checkpoint / "variables" / "manifest.ocdbt").unlink()
        case "changed record":
            text = (checkpoint / "record" / "metadata").read_text()
            (checkpoint / "record" / "metadata").write_text(text.replace("0.1", "0.2"))
        case "missing checksums":
            (checkpoint / "sha256.json").unlink()
        case "empty folder":
            shutil.rmtree(checkpoint)
            checkpoint.mkdir()


DAMAGE = {
    "truncated file": "1 of its files changed or missing: variables/",
    "flipped byte": "1 of its files changed or missing: variables/",
    "deleted file": "1 of its files changed or missing: variables/",
    "deleted index": "1 of its files changed or missing: variables/manifest.ocdbt",
    "changed record": "1 of its files changed or missing: record/metadata",
    "missing checksums": "it has no sha256.json: the run was stopped while it was written",
    "empty folder": "it has no sha256.json: the run was stopped while it was written",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(kind, tmp_path):
    _checkpoints(tmp_path, [10, 20, 30]).manager.close()
    _damage(tmp_path / "30", kind)
    checkpoints = Checkpoints(tmp_path, keep=3)
    with pytest.warns(
        UserWarning, match=rf"{tmp_path}/30: damaged checkpoint \({DAMAGE[kind]}.*Step 20 is used"
    ) as warned:
        step, variables, record = checkpoints.restore(jax.tree.map(jnp.asarray, VARIABLES))
    assert len(warned) == 1
    assert (step, record) == (20, [20, 0.1, None])
    assert jax.tree.structure(variables) == jax.tree.structure(VARIABLES)
    np.testing.assert_array_equal(variables[0]["kernel"], VARIABLES[0]["kernel"] + 20)
    checkpoints.save(30, jax.tree.map(jnp.asarray, VARIABLES), "again")
    assert checkpoints.restore(jax.tree.map(jnp.asarray, VARIABLES))[2] == "again"
    checkpoints.manager.close()


def test_no_checkpoint_is_no_error_and_none_that_can_be_read_is_one(tmp_path):
    checkpoints = _checkpoints(tmp_path, [])
    assert checkpoints.restore(VARIABLES) is None
    checkpoints.manager.close()
    _checkpoints(tmp_path, [10, 20]).manager.close()
    for step in "10", "20":
        _damage(tmp_path / step, "deleted file")
    with pytest.raises(InputError, match=rf"no checkpoint can be read \({tmp_path}/20: .*; {tmp_path}/10: "):
        Checkpoints(tmp_path, keep=3).restore(jax.tree.map(jnp.asarray, VARIABLES))
    assert names(tmp_path) == ["10", "20"]


def test_a_run_stopped_while_it_wrote_its_first_checkpoint_starts_anew(tmp_path):
    _checkpoints(tmp_path, [10]).manager.close()
    _damage(tmp_path / "10", "missing checksums")
    with pytest.warns(UserWarning, match=f"{tmp_path}/10: damaged checkpoint .*There is no other"):
        assert Checkpoints(tmp_path, keep=3).restore(jax.tree.map(jnp.asarray, VARIABLES)) is None
    assert names(tmp_path) == ["10.damaged"]
