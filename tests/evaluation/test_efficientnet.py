from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from tbcm.errors import UserError
from tbcm.evaluation import efficientnet
from tbcm.evaluation.efficientnet import FEATURE_DIM, features


def test_features_do_not_depend_on_the_batch() -> None:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    together = features(images)
    assert together.shape == (3, FEATURE_DIM)
    assert together.dtype == torch.float32
    assert torch.equal(together, features(images))
    torch.testing.assert_close(features(images, batch_size=2), together, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_network_and_preprocessing_recognise_a_photograph() -> None:
    """matplotlib's portrait of Grace Hopper in uniform: ImageNet class 652 is "military uniform"."""
    photograph = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    square = photograph.crop((0, 0, 512, 512))
    pooled = features(torch.from_numpy(np.array(square)).permute(2, 0, 1)[None])
    classifier = efficientnet.load_network(torch.device("cpu"))._fc
    probabilities = classifier(pooled).softmax(1)[0]
    assert int(probabilities.argmax()) == 652
    assert probabilities[652] > 0.3


def test_features_refuse_other_tensors() -> None:
    for images in (torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            features(images)


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    efficientnet.load_network.cache_clear()
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"pip install tbcm\[icons\]"):
        features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
