from __future__ import annotations

import json
import logging
import math
import socket
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tbcm.errors import UserError
from tbcm.runtime.failure import file_logger
from tbcm.runtime.log import MetricLog, log_to_file, logger, setup_logging


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_there_at_once_and_valid_json(tmp_path: Path) -> None:
    with MetricLog(tmp_path, 10) as log:
        log.log(1, {"loss": torch.tensor(0.5), "lr": 1e-5, "count": torch.tensor(3), "norm": torch.tensor(math.inf)})
        (row,) = rows(tmp_path)  # before closing: a kill must not cost rows
        log.log(2, {"loss": float("nan")})
    assert list(row) == ["step", "time", "loss", "lr", "count", "norm"]
    assert (row["step"], row["loss"], row["lr"], row["count"], row["norm"]) == (1, 0.5, 1e-5, 3.0, "inf")
    assert rows(tmp_path)[1]["loss"] == "nan"
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_resuming_leaves_no_row_twice_and_loses_none(tmp_path: Path) -> None:
    with MetricLog(tmp_path, 10) as log:
        for step in range(1, 7):
            log.log(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed in the middle of a row
    with MetricLog(tmp_path, 10, start_step=4) as log:  # from the checkpoint of step 4
        for step in range(5, 8):
            log.log(step, {"loss": step * 10})
    expected = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60), (7, 70)]
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == expected
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == expected


def test_a_file_that_is_not_metrics_is_not_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nmy notes\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2"):
        MetricLog(tmp_path, 10, start_step=1)
    assert "my notes" in (tmp_path / "metrics.jsonl").read_text()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricLog(tmp_path / "out", 10, is_main=False) as log:
        log.log(0, {"loss": torch.tensor(1.0)})
        log.advance()
        log.image("samples", Image.new("RGB", (4, 4)), 0)
    assert not (tmp_path / "out").exists()


def test_pictures_are_kept_twice(tmp_path: Path) -> None:
    with MetricLog(tmp_path, 10) as log:
        log.image("samples/grid", Image.new("RGB", (6, 4), (255, 0, 0)), 7)
    with Image.open(tmp_path / "images" / "samples" / "grid-00000007.png") as image:
        assert image.size == (6, 4)
        assert image.getpixel((0, 0)) == (255, 0, 0)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Images("samples/grid")
    assert (event.step, event.width, event.height) == (7, 6, 4)


def test_without_a_terminal_a_logged_step_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tbcm"), MetricLog(tmp_path, 100) as log:
        log.log(0, {"loss": 0.25, "other": 1.0})
        log.log(50, {"loss": torch.tensor(0.125)})
    first, second = [record.getMessage() for record in caplog.records]
    assert first == "step 0/100 loss 0.25"
    assert second.startswith("step 50/100 loss 0.125 (")
    assert "s/step" in second


@pytest.fixture
def loggers() -> Iterator[None]:
    """Puts tbcm's loggers back as they were."""
    before = [(each, each.handlers[:], each.level, each.propagate) for each in (logger, file_logger)]
    yield
    for each, handlers, level, propagate in before:
        for handler in each.handlers:
            handler.close()
        each.handlers[:], each.level, each.propagate = handlers, level, propagate


def become_rank_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tbcm.runtime.distributed.rank", lambda: 3)


@pytest.mark.usefixtures("loggers")
def test_messages_name_the_rank_only_away_from_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging()
    logging.getLogger("tbcm.runtime.checkpoint").info("saved")
    become_rank_3(monkeypatch)
    setup_logging()
    logger.info("unheard")
    logger.warning("heard")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["INFO saved", "[rank 3] WARNING heard"]


@pytest.mark.usefixtures("loggers")
def test_a_rank_keeps_all_its_messages_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    become_rank_3(monkeypatch)
    for number in (1, 2):  # the second is a process that was restarted
        setup_logging()
        logger.info("too early %d", number)
        log_to_file(tmp_path)
        logger.info("info %d", number)
        logger.warning("warning %d", number)
        try:
            raise ValueError(f"trouble {number}")
        except ValueError:
            file_logger.exception("failed")
    lines = (tmp_path / "logs" / "rank-00003.log").read_text().splitlines()
    assert [line for line in lines if line.startswith("ValueError")] == [
        "ValueError: trouble 1",
        "ValueError: trouble 2",
    ]
    assert "Traceback (most recent call last):" in lines
    stamped = [line.split(" rank 3 ", 1) for line in lines if " rank 3 " in line]
    said = [text for _, text in stamped if "begins" not in text]
    host = socket.gethostname()
    assert said == [
        f"({host}) {text}" for n in (1, 2) for text in (f"INFO info {n}", f"WARNING warning {n}", "ERROR failed")
    ]
    assert len(stamped) == len(said) + 2
    for stamp, _ in stamped:
        datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f")
    err = capsys.readouterr().err
    assert [line.split(" ", 1)[1] for line in err.splitlines()] == [f"[rank 3] WARNING warning {n}" for n in (1, 2)]


@pytest.mark.usefixtures("loggers")
def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    setup_logging()
    (tmp_path / "logs").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*logs/rank-00000\.log: a file stands where a folder is needed"):
        log_to_file(tmp_path)
    assert (tmp_path / "logs").read_text() == "mine"


@pytest.mark.usefixtures("loggers")
def test_the_bar_leaves_the_file_its_messages(tmp_path: Path) -> None:
    setup_logging()
    log_to_file(tmp_path)
    with MetricLog(tmp_path, 10):
        logger.info("while the bar stands")
    assert "while the bar stands" in (tmp_path / "logs" / "rank-00000.log").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_row_costs_one_sync(tmp_path: Path) -> None:
    metrics = {f"m{i}": torch.tensor(float(i), device="cuda") for i in range(8)}
    with MetricLog(tmp_path, 10) as log, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            log.log(0, metrics)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(caught) == 1
