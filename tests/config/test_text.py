"""Text, paths and YAML as people and broken disks write them."""

from __future__ import annotations

import itertools
import os
import pwd
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tbcm.config import Config, load_config
from tbcm.config.paths import path_argument, source_argument
from tbcm.config.text import annotation_of, is_text, sections_of
from tbcm.data.files import expand
from tbcm.errors import UserError

MINIMAL = "out: run\nteacher: {path: icons}\ndata: {prompts: icons}\n"


def load(tmp_path: Path, text: str | bytes = MINIMAL, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides)


def value(config: Config, key: str) -> object:
    found: object = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


LITERAL = [
    "runs/exp #2",
    "*.tar",
    "{00000..00041}.tar",
    "[new] set/*.tar",
    "2026-11-28",
    "a: b",
    "12",
    "007",
    "1e5",
    "0x1f",
    "1_000",
    "12:30:45",
    "true",
    "no",
    "~a",
    '"quoted"',
    "'quoted'",
    "&anchor",
    "*alias",
    "!tag",
    "%percent",
    "@at",
    "`tick`",
    "- dash",
    "? ask",
    "a=b",
    "[1, 2",
    "back\\slash",
    "a\tb",
    " around ",
    "日本語/проба/العربية/🐼",
]


@pytest.mark.parametrize("text", LITERAL)
@pytest.mark.parametrize("key", ["data.images", "data.column", "teacher.revision", "out"])
def test_overrides_of_text_are_literal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    if text == "~a" and key in ("data.images", "out"):
        pytest.skip("a home folder")
    found = value(load(tmp_path, MINIMAL, f"{key}={text}"), key)
    assert found == (str(tmp_path / text) if key in ("data.images", "out") else text)


def test_null_is_none_where_a_field_may_be_empty(tmp_path: Path) -> None:
    file = MINIMAL.replace("icons}\ndata", "icons, revision: a}\ndata")
    assert load(tmp_path, file, "teacher.revision=null").teacher.revision is None
    assert load(tmp_path, file, "teacher.revision=Null").teacher.revision == "Null"
    assert load(tmp_path, MINIMAL, "data.column=null").data.column == "null"
    assert load(tmp_path, MINIMAL, "teacher.architecture=null").teacher.architecture is None
    assert load(tmp_path, MINIMAL, "checkpoint.keep_every=null").checkpoint.keep_every is None


@pytest.mark.parametrize("text", ["2026-11-28", "12", "007", "1e5", "no", "12:30:45", "0x1f", "1_000", ".5", "on"])
def test_text_in_a_file_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = f"out: {text}\nteacher: {{path: icons, revision: {text}}}\ndata:\n  prompts: {text}\n"
    c = load(tmp_path, file + f"log: {{preview_prompts: [{text}, a cat]}}", "train.steps=12")
    here = str(tmp_path / text)
    assert (c.out, c.teacher.revision, c.data.prompts) == (here, text, here)
    assert c.log.preview_prompts == [text, "a cat"] and c.train.steps == 12
    assert load(tmp_path, c.to_yaml()) == c
    assert load(tmp_path, MINIMAL, f"log.preview_prompts=[{text}]").log.preview_prompts == [text]
    assert load(tmp_path, MINIMAL, f"data={{prompts: {text}}}").data.prompts == here


def test_a_key_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"c\.yaml: not YAML: line 5, column 1: 'train' is there twice"):
        load(tmp_path, MINIMAL + "train: {steps: 1}\ntrain: {seed: 2}\n")
    merged = "a: &a {steps: 5}\n"
    with pytest.raises(UserError, match="unknown key 'a'"):  # but merging and overriding is not
        load(tmp_path, MINIMAL + merged + "train: {<<: *a, steps: 6}\n")


# Files on files


def files(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_file_extends_another_section_by_section(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    files(tmp_path, base=MINIMAL + "method: {guidance: [1, 2], route: {points: 4, shift: 2}}\ntrain: {steps: 5}\n")
    files(tmp_path / "deeper", middle="extends: ../base.yaml\nmethod: {route: {points: 8}}\nteacher: {revision: 007}\n")
    files(tmp_path, top="extends: deeper/middle.yaml\nmethod: {guidance: [3]}\ntrain:\n  seed: 1\n")
    config = load_config(tmp_path / "top.yaml", ["train.steps=6"])
    expected = (
        MINIMAL.replace("icons}", "icons, revision: 007}", 1)
        + "method: {guidance: [3], route: {points: 8, shift: 2}}\ntrain: {steps: 6, seed: 1}\n"
    )
    assert config == load(tmp_path, expected)
    assert "extends" not in config.to_yaml()


def test_another_method_has_none_of_the_settings_of_the_first(tmp_path: Path) -> None:
    files(tmp_path, base=MINIMAL + "method: {guidance: [3], route: {points: 4}}\n")
    files(tmp_path, same="extends: base.yaml\nmethod: {name: tbcm, r: {final: 1}}\n")
    files(tmp_path, other="extends: base.yaml\nmethod: {name: scm}\ndata: {images: icons}\n")
    same, other = (load_config(tmp_path / name).method for name in ("same.yaml", "other.yaml"))
    assert (same.guidance, same.route.points, same.r.final) == ([3], 4, 1)
    assert other.name == "scm" and other.guidance != [3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: no.yaml", r"/no\.yaml: cannot read the configuration \(extends of .*/top\.yaml\): No such file"),
        ("extends: .", r"cannot read the configuration \(extends of .*/top\.yaml\): Is a directory"),
        ("extends: top.yaml", r"top\.yaml extends .*/top\.yaml: in a circle"),
        ("extends: a.yaml", r"top\.yaml extends .*/a\.yaml extends .*/b\.yaml extends .*/a\.yaml: in a circle"),
        ("extends: 3", "extends = 3: should be a path"),
        ("extends: [a.yaml]", "extends = .*: should be a path"),
        ("extends:", "extends = None: should be a path"),
        ('extends: "a\\0b"', "extends = .*: should be a path without NUL"),
        ("extends: ''", "extends = .*: should be a path that is not empty"),
    ],
)
def test_what_cannot_be_extended_is_said_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    files(tmp_path, top=text, a="extends: b.yaml\n", b="extends: ./a.yaml\n")
    with pytest.raises(UserError, match=words) as caught:
        load_config(tmp_path / "top.yaml")
    assert_one_line(caught.value)


def test_nor_can_an_override_extend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown key 'extends'"):
        load(tmp_path, MINIMAL, "extends=a.yaml")


# Paths

FIELDS = ["out", "teacher.path", "text.path", "text.cache", "data.prompts", "data.images", "data.latents"]


def text_fields(model: type, prefix: str = "") -> list[str]:
    found = []
    for name in model.model_fields:  # type: ignore[attr-defined]
        annotation = annotation_of(model, [name])
        if sections := sections_of(annotation):
            found += [field for section in sections for field in text_fields(section, f"{prefix}{name}.")]
        elif is_text(annotation) and "Literal" not in str(annotation):
            found.append(prefix + name)
    return found


def test_every_field_of_text_is_known_as_a_path_or_as_none() -> None:
    """A new field has to be put into one of these lists, and one that is a path to be a `UserPath`."""
    others = "teacher.architecture", "teacher.revision", "teacher.variant", "data.column", "data.caption_column"
    assert {*text_fields(Config)} == {*FIELDS, *others}


@pytest.mark.parametrize("key", FIELDS)
def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    me = pwd.getpwuid(os.getuid())
    for text, path in (("~/a b", tmp_path / "a b"), ("~", tmp_path), (f"~{me.pw_name}/x", Path(me.pw_dir, "x"))):
        assert value(load(tmp_path, MINIMAL, f"{key}={text}"), key) == str(path)
    section, _, name = key.partition(".")
    tree = yaml.safe_load(MINIMAL)
    (tree.setdefault(section, {}) if name else tree)[name or section] = "~/a b"
    assert value(load(tmp_path, yaml.safe_dump(tree)), key) == str(tmp_path / "a b")
    with pytest.raises(UserError, match=f"{key} = '~nobody-at-all/x': .*'nobody-at-all' has a home"):
        load(tmp_path, MINIMAL, f"{key}=~nobody-at-all/x")


def test_home_folders_on_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_argument("~/x") == tmp_path / "x" and source_argument("~/x") == str(tmp_path / "x")
    assert source_argument("./~x") == "./~x" and source_argument("org/model") == "org/model"


@pytest.mark.parametrize("key", FIELDS)
def test_what_is_there_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    for text in ("../real", "../link", ".", "../link/../real/"):
        assert value(load(tmp_path, MINIMAL, f"{key}={text}"), key) == str(tmp_path / "real")


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["teacher.path", "text.path"], ["org/model", "icons"]),
        (["data.prompts", "data.images"], ["icons"]),
    ],
)
def test_names_that_are_no_paths_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str], names: list[str]
) -> None:
    (tmp_path / "icons").mkdir()
    monkeypatch.chdir(tmp_path)
    for key, name in itertools.product(keys, names):
        assert value(load(tmp_path, MINIMAL, f"{key}={name}"), key) == name


@pytest.mark.parametrize("here", ["plain", "[a]*?", "{0..2}", "{a,b} **", "x/{b}"])
@pytest.mark.parametrize(
    "pattern",
    ["*.txt", "parts/*.txt", "parts/{0..1}.txt", "./**/?.txt", "../link/parts/[01].txt", "../link/../[k]eep/0.txt"],
)
def test_a_saved_pattern_names_the_same_files_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str, pattern: str
) -> None:
    """Whatever the folder is called that it was given in: `link` leads elsewhere, and .. behind it to there."""
    cwd, real = tmp_path / here, tmp_path / "else" / "real"
    for folder in (cwd / "parts", real / "parts", real.parent / "keep", tmp_path / "a", tmp_path / "0"):
        folder.mkdir(parents=True)
        for name in ("0.txt", "1.txt"):
            (folder / name).write_text(str(folder))
            (folder.parent / name).write_text(str(folder.parent))
    (cwd.parent / "link").symlink_to(real)
    monkeypatch.chdir(cwd)
    there = [path.resolve() for path in expand(pattern)]
    assert there and all(path.is_file() for path in there)
    for key in ("data.prompts", "data.images"):
        monkeypatch.chdir(cwd)
        saved = load(tmp_path, MINIMAL, f"{key}={pattern}").to_yaml()
        monkeypatch.chdir("/")
        again = value(load(tmp_path, saved), key)
        assert [path.resolve() for path in expand(again)] == there
        assert value(load(tmp_path, saved), key) == again  # and does not change once more


BAD_PATHS = ["", "  ", "a\0b", "x" * 256, "é" * 128, "a/" * 2100, "bad\udcff", "~nobody-at-all"]


@pytest.mark.parametrize("text", BAD_PATHS)
def test_no_path_can_be_this(tmp_path: Path, text: str) -> None:
    for key in FIELDS:
        with pytest.raises(UserError, match=f"{key} = .*should be a path") as caught:
            load(tmp_path, MINIMAL, f"{key}={text}")
        assert_one_line(caught.value)
    for argument in (path_argument, source_argument):
        with pytest.raises(UserError, match="should be a path") as caught:
            argument(text)
        assert_one_line(caught.value)


# Fuzzing

WHOLE = (
    MINIMAL + "log: {every: 3, preview_prompts: [a cat, 'two: dogs']}\ntrain:\n  steps: 12\n  seed: 0x10\nmethod:\n"
    "  guidance: [1, 2.5]\n  route: {points: 4, shift: 1e-1}\n  r: &r {final: .5}\noptimizer:\n  betas: [0.9, 0.99]\n"
    "  name: adamw # a comment\ntext:\n  path: ~\nextends: other.yaml\n"
)
OTHER = "train: {steps: 3}\nmethod: {route: {points: 5}}\n"
PIECES = [
    *"[]{}:,-?!&*#|>%@`'\"\\~<=\t\n ",
    *(": ", "- ", "\n  ", "---\n", "...\n", "<<: *r", "&a", "*a", "&a [*a]", "? ", "!!", "!!binary ", "!!timestamp "),
    *("!!int ", "!!bool ", "!!float ", "!!set ", "!!omap ", "!!python/object:os.system ", "!<x>", "%YAML 9.9\n"),
    *("2026-13-45", "2026-02-30T25:61:61Z", "0b", "0x", "0o9", "1:99:99", ".inf", ".nan", "1e999", "9" * 5000),
    *(
        "0x" + "f" * 5000,
        "null",
        "yes",
        "[" * 600,
        "{a: " * 400,
        "- " * 400,
        "\ufeff",
        "\0",
        "\x07",
        "\u2028",
        "\U0001f43c",
    ),
    *('"\\0"', '"\\ud800"', '"\\x"', "'", "x" * 300, "../" * 3000, "1: 2", "[1]: 2", "{}: x", "=", "_"),
]
BYTES = [b"\xff", b"\xfe\xff", b"\x80", b"\xed\xa0\x80", b"\xc3", b"\x00", b"\r", b"\xef\xbb\xbf"]
COUNT = 1600


def assert_one_line(error: UserError) -> None:
    said = str(error)
    assert len(said.splitlines()) == 1 and " at 0x" not in said and len(said) < 5000, said[:5000]
    said.encode()


def mutated(content: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(content) + 1)
        end = min(len(content), start + draw.choice([0, 0, 1, 3, 40]))
        new = draw.choice([draw.choice(PIECES).encode(errors="surrogatepass"), draw.choice(BYTES), b""])
        content = content[:start] + new + content[end:]
    return content[: draw.randrange(len(content))] if content and draw.random() < 0.1 else content


def outcome(work: Callable[[], Config]) -> bool:
    """Whether it worked; else it was a UserError of one line."""
    try:
        config = work()
    except UserError as error:
        assert_one_line(error)
        return False
    config.to_yaml()
    return True


def test_whatever_is_in_a_file_ends_in_one_line(tmp_path: Path) -> None:
    draw, whole = random.Random(0), WHOLE.encode()
    files(tmp_path, other=OTHER)
    assert outcome(lambda: load(tmp_path, whole))
    cases = [mutated(whole, draw) for _ in range(COUNT)] + [draw.randbytes(draw.randint(0, 99)) for _ in range(200)]
    done = [outcome(lambda case=case: load(tmp_path, case)) for case in cases]  # type: ignore[misc]
    assert 0.02 < sum(done) / len(done) < 0.9  # most are malformed, some are not


def test_whatever_is_overridden_ends_in_one_line(tmp_path: Path) -> None:
    draw = random.Random(1)
    keys = ["train.steps", "log.preview_prompts", "method.guidance", "out", "data.images", "teacher", "train.compile"]
    for _ in range(COUNT):
        text = "".join(draw.choice([*PIECES, "a", "1"]) for _ in range(draw.randint(0, 4)))
        key = draw.choice([*keys, text, f"train.{text}"])
        outcome(lambda given=f"{key}={text}": load(tmp_path, MINIMAL, given))  # type: ignore[misc]


def test_a_bomb_of_aliases_is_said_in_short(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(UserError) as caught:
        load(tmp_path, MINIMAL + "\n".join(lines) + "\nmethod: {guidance: *a11}\n")
    assert_one_line(caught.value)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path), lambda path: path.symlink_to("no")])
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "c.yaml"
    make(path)
    with pytest.raises(UserError, match=r"c\.yaml: cannot read the configuration") as caught:
        load_config(path)
    assert_one_line(caught.value)
