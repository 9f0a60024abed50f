"""Pictures out of folders and arrays, and as a tower wants them."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tcw.calibration import images
from tcw.errors import MissingDependency, SourceError


def pixels(seed, height=40, width=60):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_a_folder_in_the_order_of_names(tmp_path):
    for n in (2, 0, 1):
        Image.fromarray(pixels(n)).save(tmp_path / f"{n}.png")
    Image.fromarray(pixels(3)[..., 0]).save(tmp_path / "grey.PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    found = images.read_images(tmp_path)
    assert [np.array_equal(found[n], pixels(n)) for n in range(3)] == [True] * 3
    assert np.array_equal(found[3], np.repeat(pixels(3)[..., :1], 3, -1))


def test_an_array(tmp_path):
    np.save(tmp_path / "a.npy", np.stack([pixels(0), pixels(1)]))
    found = images.read_images(tmp_path / "a.npy")
    assert len(found) == 2
    assert np.array_equal(found[1], pixels(1))


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_an_array_of_something_else(tmp_path, wrong):
    np.save(tmp_path / "a.npy", wrong)
    with pytest.raises(SourceError, match="no pictures"):
        images.read_images(tmp_path / "a.npy")


def test_a_pickle_is_not_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(SourceError, match="cannot read"):
        images.read_images(tmp_path / "a.npy")


def test_what_is_not_there(tmp_path):
    with pytest.raises(SourceError, match="holds no PNG or JPEG"):
        images.read_images(tmp_path)
    with pytest.raises(SourceError, match="cannot read the pictures"):
        images.read_images(tmp_path / "none")
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(SourceError, match=r"cannot read the picture `a\.png`"):
        images.read_images(tmp_path)


def test_without_pillow(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependency, match="pillow") as error:
        images.read_images(tmp_path)
    assert "tcw[vision]" in error.value.hint


def test_normalised_with_the_models_numbers(tmp_path):
    said = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3], "crop_size": {"height": 10, "width": 20}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    (found,) = images.normalised([pixels(0)], tmp_path)
    for c in range(3):
        wanted = (pixels(0)[..., c].astype(np.float64) / 255 - said["image_mean"][c]) / said["image_std"][c]
        assert np.allclose(found[c].numpy(), wanted, atol=1e-5)
    (cut,) = images.prepared([pixels(0)], tmp_path, SimpleNamespace())
    assert cut.shape == (3, 10, 20)
    (own,) = images.prepared([pixels(0)], tmp_path, SimpleNamespace(image_size=16))
    assert own.shape == (3, 16, 16), "the tower's size comes first"


def test_the_middle_is_cut_out(tmp_path):
    """Of a picture with the right height nothing is resized: its middle columns are taken as they are."""
    (found,) = images.prepared([pixels(0, 16, 40)], tmp_path, SimpleNamespace(image_size=16))
    wanted = torch.from_numpy(pixels(0, 16, 40)).permute(2, 0, 1).float()[:, :, 12:28] / 255
    assert torch.allclose(found, (wanted - 0.5) / 0.5, atol=1e-5)


def test_a_bad_preprocessor_file(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(SourceError, match="not valid JSON"):
        images.normalised([pixels(0)], tmp_path)


def test_kinds(tmp_path):
    assert images.is_images(tmp_path)
    assert images.is_images(tmp_path / "a.npy")
    assert not images.is_images(tmp_path / "a.txt")
