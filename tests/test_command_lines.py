"""The command lines as a user meets them: a whole small run, and every kind of bad input in one line."""

from __future__ import annotations

import argparse
import errno
import os
import pty
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import published
import pytest
import torch
from diffusers import SanaPipeline, SanaSprintPipeline
from helpers import tiny_sana
from PIL import Image
from safetensors.torch import load_file, save_file
from sana_cases import sprint_latents
from tiny import metrics, write_config, write_teacher
from warm_processes import started

from tbcm import convert, encode, encode_images, evaluate, export, sample, train
from tbcm.config.paths import path_argument, source_argument, text_argument
from tbcm.errors import UserError
from tbcm.figures import __main__ as figures
from tbcm.icons import autoencoder, dataset, demo
from tbcm.icons import teacher as icons_teacher
from tbcm.inference.generation import open_sampler
from tbcm.runtime import checkpoint

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"a {c} ball" for c in ("red", "green", "blue", "black", "white")) + "\n")
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line's `main` in this process: exit code, stdout, stderr."""

    def run(main: Callable[[], int], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tbcm", *map(str, arguments)])
        code = main()
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def config(tmp_path: Path, teacher: Path, prompts: Path) -> Path:
    return write_config(tmp_path / "c.yaml", teacher, prompts, tmp_path / "run", log={"every": 2, "preview_every": 3})


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "prompts.txt").write_text("a red ball\na blue ball\n")
    path = write_config(
        folder / "c.yaml", teacher, folder / "prompts.txt", folder / "run", train={"steps": 3, "prompts_per_step": 2}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tbcm", str(path)])
        assert train.main() == 0
    return folder / "run"


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1, err
    assert all(word in lines[0] for word in words), lines[0]


def test_train_resume_sample_and_previews(call: Run, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call(train.main, config, "train.steps=4")[0] == 0
    assert_one_line(call(train.main, config), str(run), "--resume")
    assert call(train.main, config, "--resume")[0] == 0
    assert [row["step"] for row in metrics(run)] == [2, 4, 6]
    assert {p.name for p in (run / "images").iterdir()} == {f"preview-0000000{i}.png" for i in (0, 3, 6)}
    assert list((run / "tensorboard").iterdir())
    code, out, _ = call(sample.main, run, "a red ball", "a cat", "--steps", 2, "--out", tmp_path / "s")
    assert code == 0 and str(tmp_path / "s" / "sheet.png") in out
    assert Image.open(tmp_path / "s" / "0001.png").size == (64, 64)
    assert call(sample.main, run, "a cat", "--teacher", "--steps", 3, "--out", tmp_path / "t")[0] == 0
    assert_one_line(call(sample.main, run, "a cat", "--steps", 0), "--steps 0")


def test_a_published_file_becomes_a_teacher(call: Run, config: Path, teacher: Path, tmp_path: Path) -> None:
    given = published.sana(tiny_sana(seed=1, caption_channels=384, timestep_scale=0.001))
    torch.save({"state_dict": given}, tmp_path / "Sana.pth")
    code, out, _ = call(convert.main, tmp_path / "Sana.pth", tmp_path / "made", "--like", teacher)
    assert code == 0
    assert out.splitlines() == [
        "left out: y_embedder.y_embedding: diffusers' pipelines encode an empty prompt instead",
        "left out: pos_embed: positions are computed",
        f"wrote {tmp_path / 'made'}: transformer of {tmp_path / 'Sana.pth'}; scheduler, vae of {teacher}",
    ]
    few = "train.steps=1", "train.prompts_per_step=2", "log.preview_every=0"
    assert call(train.main, config, f"teacher.path={tmp_path / 'made'}", *few)[0] == 0
    assert_one_line(call(convert.main, tmp_path / "Sana.pth", tmp_path / "made", "--like", teacher), "made", "exists")
    assert_one_line(call(convert.main, tmp_path / "Sana.pth", tmp_path / "more", "--like", teacher, "--ema"), "--ema")
    assert_one_line(call(convert.main, tmp_path / "Sana.pth", tmp_path / "more", "--like", "icons"), "do not fit")


def test_print_config_loads_nothing_and_is_a_configuration(call: Run, config: Path, tmp_path: Path) -> None:
    code, out, _ = call(train.main, config, "train.steps=11", "teacher.path=nowhere", "--print-config")
    assert code == 0 and "steps: 11" in out
    again = tmp_path / "again.yaml"
    again.write_text(out)
    assert call(train.main, again, "--print-config")[1] == out


@pytest.mark.parametrize("name", ["sana-600m", "icons"])
def test_dry_run_counts_parameters_flops_and_memory(call: Run, name: str) -> None:
    path = ROOT / "configs" / ("icons.yaml" if name == "icons" else "sana_1gpu.yaml")
    few = ["method.route.points=2", "train.prompts_per_step=1"]
    code, out, _ = call(train.main, path, "--dry-run", "--device", "cpu", *few)
    assert code == 0 and "accounted, not measured" in out and "TFLOP" in out
    assert {"sana-600m": "591.9 M parameters", "icons": "5.9 M parameters"}[name] in out


def test_exported_student_is_a_sana_sprint_pipeline_with_our_latents(call: Run, finished: Path, tmp_path: Path) -> None:
    """The same latents as tbcm.sample's for the same noise in 1, 2 and 4 steps, from plain diffusers."""
    out = tmp_path / "pipeline"
    code, printed, _ = call(export.main, finished, out)
    assert code == 0
    assert "height=64, width=64, use_resolution_binning=False" in printed
    assert printed.split("\n\n", 1)[1] in (out / "README.md").read_text()
    assert_one_line(call(export.main, finished, out), str(out), "exists")
    pipeline = SanaSprintPipeline.from_pretrained(out, text_encoder=None, tokenizer=None)  # it was MiniLM's
    ours, again = open_sampler(str(finished), device="cpu"), open_sampler(str(out), device="cpu")
    names = ["a red ball", "a blue ball"]
    embeds, mask = ours.text.encoder.encode(names)
    for steps in (1, 2, 4):
        latents = ours.latents(names, steps=steps, guidance=2.5, seed=3)
        torch.testing.assert_close(again.latents(names, steps=steps, guidance=2.5, seed=3), latents)
        draws = [generator_of(3, i) for i in range(2)]
        theirs = sprint_latents(pipeline, embeds, mask, draws, steps)
        torch.testing.assert_close(latents, theirs, rtol=1e-4, atol=1e-4)


def generator_of(seed: int, image: int) -> torch.Generator:
    from tbcm.runtime.seeding import generator

    return generator("cpu", seed, image, "sample")


def test_a_student_of_sparse_time_is_exported_as_its_teachers_own_pipeline(
    call: Run, tmp_path: Path, prompts: Path
) -> None:
    """As of Sana 1.0: SanaSprintPipeline would pass its network s, and not 1000 s. Guidance is in the weights."""
    other = write_teacher(tmp_path / "sparse", timestep_scale=1.0)
    sections = {"train": {"steps": 3}, "student": {"guidance_embeds_scale": 1.0}, "optimizer": {"lr": 1e-2}}
    path = write_config(tmp_path / "c.yaml", other, prompts, tmp_path / "run", **sections)
    assert call(train.main, path)[0] == 0
    code, printed, _ = call(export.main, tmp_path / "run", tmp_path / "out")
    assert code == 0 and "sigmas=[1.0]" in printed and "height=64" in printed
    ours, again = (open_sampler(str(tmp_path / name), device="cpu") for name in ("run", "out"))
    names, middle = ["a red ball", "a blue ball"], 3.0
    latents = ours.latents(names, steps=1, guidance=middle, seed=3)
    other_scale = ours.latents(names, steps=1, guidance=2.0, seed=3)
    assert (latents - other_scale).abs().max() > 1e-3
    torch.testing.assert_close(again.latents(names, steps=1, seed=3), latents, rtol=1e-4, atol=1e-4)
    pipeline = SanaPipeline.from_pretrained(tmp_path / "out", text_encoder=None, tokenizer=None)
    embeds, mask = ours.text.encoder.encode(names)
    noise = torch.stack([torch.randn(4, 8, 8, generator=generator_of(3, i)) for i in range(2)])
    theirs = pipeline(
        prompt_embeds=embeds,
        prompt_attention_mask=mask.float(),
        latents=noise,
        sigmas=[1.0],
        num_inference_steps=1,
        guidance_scale=1.0,
        height=64,
        width=64,
        use_resolution_binning=False,
        output_type="latent",
    )[0]
    torch.testing.assert_close(latents, theirs, rtol=1e-4, atol=1e-4)


def test_a_time_that_no_pipeline_passes_cannot_be_exported(call: Run, tmp_path: Path, prompts: Path) -> None:
    other = write_teacher(tmp_path / "sparse", timestep_scale=1.0)
    path = write_config(tmp_path / "c.yaml", other, prompts, tmp_path / "run", train={"steps": 1})
    assert call(train.main, path, "teacher.timestep_scale=500")[0] == 0
    assert_one_line(call(export.main, tmp_path / "run", tmp_path / "out"), "500", "1000", "cannot be exported")
    assert not (tmp_path / "out").exists()


# Bad input


def test_prompt_files(call: Run, config: Path, tmp_path: Path) -> None:
    def given(content: bytes | None, name: str = "p.txt") -> tuple[int, str, str]:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        return call(train.main, config, f"data.prompts={path}")

    assert_one_line(given(None, "missing.txt"), "missing.txt")
    assert_one_line(given(b""), "p.txt", "no prompts")
    assert_one_line(given("a caf\xe9\n".encode("latin-1")), "p.txt", "UTF-8")
    assert_one_line(given(b"fine\n\0\0\n"), "p.txt", "line 2", "is not text")
    assert_one_line(given(b"x", "p.docx"), "p.docx", ".txt")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_folders_that_are_no_teacher(call: Run, config: Path, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_line(call(train.main, config, f"teacher.path={tmp_path / 'empty'}"), "empty", "model_index.json")
    assert_one_line(call(train.main, config, f"teacher.path={tmp_path / 'nowhere'}"), "nowhere", "model_index.json")
    cut = tmp_path / "cut"
    shutil.copytree(teacher, cut)
    weights = cut / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert_one_line(call(train.main, config, f"teacher.path={cut}"), "cut", "transformer")
    assert_one_line(call(sample.main, tmp_path / "empty", "a cat"), "empty", "neither")
    assert_one_line(call(sample.main, teacher, "a cat"), "--teacher")


def test_unknown_keys_are_refused_before_anything_is_loaded(call: Run, config: Path, tmp_path: Path) -> None:
    assert_one_line(call(train.main, config, "train.stepz=3", "teacher.path=nowhere"), "train.stepz")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.mode=zero", ["parallel.mode = 'zero'", "'ddp' or 'fsdp'"]),
        ("parallel.shard=0", ["parallel.shard = 0", "greater than 0"]),
        ("parallel.shards=2", ["unknown key 'parallel.shards'", "mode, shard, timeout_minutes"]),
        ("parallel.timeout_minutes=-1", ["parallel.timeout_minutes = -1", "greater than 0"]),
        ("parallel=fsdp", ["parallel = 'fsdp'", "dictionary"]),
        ("checkpoint.every=0", ["checkpoint.every = 0"]),
        ("checkpoint.asynchronous=often", ["checkpoint.asynchronous = 'often'", "boolean"]),
        ("text.cache=nowhere", ["nowhere", "no cache of text states", "tbcm.encode"]),
        ("data.prompts=nowhere.txt", ["nowhere.txt", "no such prompt file"]),
        ("data.prompts=nowhere.docx", ["nowhere.docx", "no such prompt file"]),
        ("teacher.path=nowhere", ["nowhere", "no diffusers pipeline there"]),
        ("out=prompts.txt", ["prompts.txt: a file stands where a folder is needed"]),
        ("train.prompts_per_step", ["write section.key=value"]),
        ("parallel.mode=fsdp optimizer.name=came", ["parallel.mode=fsdp needs optimizer.name=adamw"]),
    ],
)
def test_bad_inputs_of_a_distributed_run_are_one_line(
    call: Run, config: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, override: str, words: list[str]
) -> None:
    monkeypatch.chdir(prompts.parent)
    assert_one_line(call(train.main, config, *override.split()), *words)


def test_a_checkpoint_cut_in_half(call: Run, config: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    assert call(train.main, config, "checkpoint.every=2", "train.steps=4")[0] == 0
    newest = sorted(checkpoints.iterdir())[-1]
    for file in newest.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code, _, err = call(train.main, config, "--resume")
    assert code == 0 and "damaged" in err and "resumed after step 2" in err
    for folder in checkpoints.iterdir():
        for file in folder.glob("*.distcp"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert_one_line(call(train.main, config, "--resume"), "damaged")


def test_a_full_disk_leaves_the_last_checkpoint(
    call: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed.checkpoint as dcp

    real, calls = dcp.save, []

    def save(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(dcp, "save", save)
    assert_one_line(call(train.main, config, "checkpoint.every=2"), "disk is full", "step-0000000")
    assert len(calls) > 2  # it tried once more, with the state that was reached when it was noticed
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert checkpoint.latest(tmp_path / "run") is not None


def test_resuming_what_was_never_saved_starts_it(call: Run, config: Path, tmp_path: Path) -> None:
    """A cluster's script is the same whether the run was preempted before its first checkpoint or after."""
    code, _, err = call(train.main, config, "--resume", "train.steps=2")
    assert code == 0 and f"{tmp_path / 'run'} has no checkpoint" in err
    assert [row["step"] for row in metrics(tmp_path / "run")] == [2]


def test_values_that_fit_no_device_or_image(call: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_line(call(train.main, config, "--device", "cuda"), "CUDA")
    assert_one_line(call(train.main, config, "resolution=100"), "resolution", "100", "8")


def test_two_runs_in_one_folder(call: Run, config: Path, tmp_path: Path) -> None:
    from tbcm.runtime.lock import RunLock

    with RunLock(tmp_path / "run"):
        assert_one_line(call(train.main, config), "in use")


def test_ctrl_c_saves_and_says_how_to_go_on(config: Path, tmp_path: Path) -> None:
    arguments, said = [str(config), "train.steps=100000", "log.preview_every=0"], tmp_path / "said.txt"
    log = tmp_path / "run" / "metrics.jsonl"
    with started(train_by_itself, arguments, said) as process:
        while not (log.exists() and log.stat().st_size) and process.is_alive():
            time.sleep(0.1)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join()
        assert process.exitcode == 130 and "--resume" in said.read_text(), said.read_text()
    assert checkpoint.latest(tmp_path / "run") is not None


def train_by_itself(arguments: list[str], said: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server that forks ignores
    sys.argv = ["tbcm.train", *arguments]
    with said.open("w") as sys.stderr:
        sys.exit(train.main())


def test_a_closed_terminal_saves(config: Path, tmp_path: Path) -> None:
    """Not even its messages have anywhere to go any more."""
    arguments, said = [str(config), "train.steps=100000", "log.preview_every=0"], tmp_path / "said.txt"
    with started(train_in_a_terminal_that_closes, arguments, tmp_path / "run" / "metrics.jsonl", said) as process:
        process.join(180)
        assert process.exitcode == 0
    assert said.read_text() == "130"
    assert checkpoint.latest(tmp_path / "run") is not None


def train_in_a_terminal_that_closes(arguments: list[str], log: Path, said: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may have been started by nohup
        sys.argv = ["tbcm.train", *arguments]
        os._exit(train.main())
    os.set_blocking(terminal, False)
    while not (log.exists() and log.stat().st_size):
        time.sleep(0.1)
        with suppress(OSError):
            os.read(terminal, 1 << 16)  # else the terminal fills up, and what writes to it waits
    os.close(terminal)
    said.write_text(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


# Paths


@pytest.mark.parametrize("where", ["elsewhere", "moved"])
def test_a_run_of_a_relative_teacher_goes_on_from_anywhere(
    call: Run, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    home = tmp_path / "home"
    shutil.copytree(teacher, home / "teacher")
    (home / "prompts.txt").write_text("a red ball\na blue ball\n")
    monkeypatch.chdir(home)
    path = write_config(home / "c.yaml", Path("./teacher"), Path("prompts.txt"), Path("runs/a b #1"))
    few = "train.steps=1", "train.prompts_per_step=2", "checkpoint.every=1"
    assert call(train.main, path, *few)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = home / "runs" / "a b #1"
    if where == "moved":
        run = Path(shutil.move(run, tmp_path / "moved"))
    for more in ([], ["--teacher", "--steps", 2]):
        assert call(sample.main, run, "a cat", *more, "--out", "samples")[0] == 0
    assert call(export.main, run, "exported")[0] == 0
    assert call(train.main, run / "config.yaml", f"out={run}", "train.steps=2", "--resume")[0] == 0
    assert checkpoint.load(run, {})["step"] == 2


def test_home_folders_in_every_path_of_a_run(
    call: Run, teacher: Path, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, tmp_path / "teacher")
    write_config(tmp_path / "c.yaml", Path("~/teacher"), Path("~/prompts.txt"), Path("~/run"))
    cache = ["--config", "~/c.yaml"]
    assert call(encode.main, "~/prompts.txt", "~/cache", *cache)[0] == 0
    assert call(train.main, "~/c.yaml", "text.cache=~/cache", "train.steps=1")[0] == 0
    assert call(sample.main, "~/run", "a cat", "--out", "~/samples")[0] == 0
    assert call(export.main, "~/run", "~/exported")[0] == 0
    assert {"run", "cache", "samples", "exported"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "~").exists()


COMMANDS = [
    train.main,
    convert.main,
    encode.main,
    encode_images.main,
    sample.main,
    export.main,
    evaluate.main,
    figures.main,
    demo.main,
    dataset.main,
    autoencoder.main,
    icons_teacher.main,
]
NO_PATHS = {"overrides", "name", "device", "size"}


@pytest.mark.parametrize("main", COMMANDS, ids=lambda main: main.__module__)
def test_every_argument_of_text_is_known_as_a_path_or_as_none(main: Callable[[], int], call: Run) -> None:
    """A new one has to be put into `NO_PATHS`, or to be a path."""
    parsers: list[argparse.ArgumentParser] = []

    def keep(self: argparse.ArgumentParser, *arguments: object) -> None:
        parsers.append(self)
        raise UserError("kept")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, keep)
        assert_one_line(call(main), "kept")
    actions = [action for action in parsers[0]._actions if action.nargs != 0 and action.choices is None]
    texts = {action.dest: action.type for action in actions if action.type not in (int, float)}
    known = {path_argument, source_argument, text_argument}
    assert {dest for dest, kind in texts.items() if kind not in known} <= NO_PATHS


ODD = ["", "x" * 300, "a/" * 2100, "bad\udcff", "~nobody-at-all", "no such folder", "org/no-such-model", "loop", "file"]


@pytest.mark.parametrize("text", ODD)
def test_no_source_can_be_this(call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("file").write_text("")
    for main, *more in ((sample.main, "a cat"), (export.main, "out"), (evaluate.main,), (figures.main,)):
        given = ["equivalent-noise", text] if main is figures.main else [text, *more]
        assert_one_line(call(main, *given))
    save_file({"a": torch.ones(1)}, "weights.safetensors")
    assert_one_line(call(convert.main, text, "out", "--like", "icons"))
    assert_one_line(call(convert.main, "weights.safetensors", "out", "--like", text))
    assert not Path("out").exists()


@pytest.mark.parametrize("text", ODD[:5] + ODD[-2:])
def test_no_output_can_be_this(call: Run, finished: Path, tmp_path: Path, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        Path("loop").symlink_to("loop")
        Path("file").write_text("")
        assert_one_line(call(export.main, finished, text))
        assert_one_line(call(convert.main, "file", text, "--like", "icons"))
        assert_one_line(call(sample.main, finished, "a cat", "--out", text))
        assert_one_line(call(sample.main, finished, "bad \udcff", "--out", "out"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def as_folder(path: Path) -> None:
    path.mkdir()


def as_loop(path: Path) -> None:
    path.symlink_to(path)


def with_bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


NOISE = with_bytes(b"\xff\xfe\x00 {[\n")
DAMAGES = [
    *(("metrics.jsonl", make) for make in (as_folder, NOISE, with_bytes(b"{}\n1\n"))),
    *(("checkpoints", make) for make in (as_loop, NOISE)),
    *(("config.yaml", make) for make in (as_folder, as_loop, NOISE)),
    *((".lock", as_folder), ("logs", as_loop), ("prompts", NOISE)),
    *(
        ("checkpoints/step-00000003/manifest.json", make)
        for make in (as_loop, with_bytes(b"[]"), with_bytes(b"[" * 9999))
    ),
]


@pytest.mark.parametrize(("name", "make"), DAMAGES)
def test_whatever_has_become_of_a_run(
    call: Run, finished: Path, tmp_path: Path, name: str, make: Callable[[Path], object]
) -> None:
    """It is resumed, sampled and exported, or refused in one line."""
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)
    few = "train.steps=4", "log.preview_every=0"
    for main, *arguments in (
        (train.main, finished.parent / "c.yaml", f"out={run}", *few, "--resume"),
        (sample.main, run, "a cat", "--out", tmp_path / "samples"),
        (export.main, run, tmp_path / "exported"),
    ):
        result = call(main, *arguments)
        if result[0]:
            assert_one_line(result)


def test_the_black_latent_is_made_once_and_kept_with_the_run(finished: Path) -> None:
    stored = load_file(next(finished.glob("black_latent-*.safetensors")))
    assert stored["64"].shape == (4, 8, 8) and stored["64"].dtype == torch.float32
