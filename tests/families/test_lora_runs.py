"""Runs of adapters by other methods than TBCM, with what is asked of a run: previews, samples, an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families.test_training import CPU, of_images
from PIL import Image

from tbcm import evaluate, sample
from tbcm.config import Config, load_config
from tbcm.setup.parts import build_parts
from tbcm.training.trainer import Trainer


def lora(name: str, folder: Path, method: dict[str, Any], **sections: Any) -> Config:
    of_images(name, folder, method)
    tree = yaml.safe_load((folder / "c.yaml").read_text()) | {"student": {"lora": {"rank": 2}}, **sections}
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(folder / "c.yaml")
    (folder / "run" / "config.yaml").write_text(config.to_yaml())
    return config


@pytest.mark.parametrize(("name", "method"), [("sd3", "scm"), ("pixart", "sprint")])
def test_adapters_alone_are_trained(name: str, method: str, tmp_path: Path) -> None:
    trainer = Trainer(config := lora(name, tmp_path, {"name": method}), CPU, build_parts(config, CPU))
    before = {key: value.clone() for key, value in trainer.student.state_dict().items()}
    for _ in range(3):
        trainer.train_step()
    after = trainer.student.state_dict()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    trained = {key for key, value in trainer.student.named_parameters() if value.requires_grad}
    assert moved <= trained and len(moved) > 0.9 * len(trained)  # the last block's text goes nowhere
    assert int(trainer.guard.total) == 0 and all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_previews_samples_and_an_evaluation(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bf16 adapters of fp32 stand on shared weights that are not."""
    config = lora("sd3", tmp_path, {"name": "scm"}, log={"preview_every": 2, "preview_prompts": ["a red panda"]})
    half = {name: getattr(config, name).model_copy(update={"precision": precision}) for name in ("teacher", "student")}
    config = config.model_copy(update=half)
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    Trainer(config, CPU, build_parts(config, CPU)).run()
    sheets = sorted(file.name for file in (tmp_path / "run" / "images").iterdir())
    assert len(sheets) == 2  # before the first step, and after the second
    run = str(tmp_path / "run")
    assert call(monkeypatch, sample, run, "a red panda", "--steps", "1", "--out", str(tmp_path / "samples")) == 0
    assert (16, 16) in [Image.open(image).size for image in (tmp_path / "samples").glob("*.png")]
    if precision == "fp32":
        (tmp_path / "few.txt").write_text("a red panda\nblue cat")
        few = ["--prompts", str(tmp_path / "few.txt"), "--metrics", "agreement", "--steps", "1"]
        few += ["--out", str(tmp_path / "report")]
        assert call(monkeypatch, evaluate, run, *few) == 0, capsys.readouterr().err
        assert "agreement" in (tmp_path / "report" / "report.json").read_text()


def call(monkeypatch: pytest.MonkeyPatch, module: Any, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", [module.__name__, *arguments, "--device", "cpu"])
    code: int = module.main()
    return code
