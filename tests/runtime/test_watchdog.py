from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NoReturn

import pytest
import torch.distributed as dist

from tbcm.runtime import failure, signs
from tbcm.runtime.signs import Board, Pulse, Sign, gone, to_blame
from tbcm.runtime.watchdog import EXIT_CODE, Watchdog


class EndedError(Exception):
    pass


@pytest.fixture(autouse=True)
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a watchdog would have said on ending this process."""
    said: list[str] = []

    def end(code: int, summary: str, detail: str = "") -> NoReturn:
        assert code == EXIT_CODE
        said.append(f"{summary}\n{detail}")
        raise EndedError

    monkeypatch.setattr(failure, "end", end)
    return said


def two(timeout: float = 600.0) -> tuple[list[Watchdog], list[Board]]:
    """The watchdogs of two ranks in one process, without their threads, after a first sign."""
    store = dist.HashStore()
    dogs = [Watchdog(timeout, Pulse()) for _ in range(2)]
    boards = [Board(store, rank, 2, f"host{rank}", dogs[0].interval) for rank in range(2)]
    for dog, board in zip(dogs, boards, strict=True):
        dog.board = board
        board.publish(dog.pulse)
    return dogs, boards


def live(dog: Watchdog, board: Board, seconds: float) -> None:
    """What both threads of a rank do in that time."""
    for _ in range(round(seconds / dog.interval)):
        board.publish(dog.pulse, "its stack" if dog.pulse.state()[2] > dog.timeout else "")
        dog.found = dog._look(board)
        dog._answered = dog.pulse.clock
        dog.tick(dog.interval)


def hang_here(dog: Watchdog) -> None:
    dog.tick(5)


def test_a_rank_without_a_beat_ends_with_its_stack(ends: list[str]) -> None:
    dog = Watchdog(600, Pulse())
    dog.pulse.beat(17)
    for _ in range(120):  # 600 s
        dog.tick(5)
    dog.pulse.beat(18)
    for _ in range(120):
        dog.tick(5)
    assert not ends
    with pytest.raises(EndedError):
        hang_here(dog)
    assert "rank 0 of 1" in ends[0]
    assert "has been at step 18 for 605 s, here:" in ends[0]
    assert "in hang_here" in ends[0]


def test_time_in_suspension_does_not_count() -> None:
    dog = Watchdog(600, Pulse())
    dog.tick(100_000.0)
    assert dog.pulse.state()[2] == 5


def test_waiting_is_not_working_and_leaving_it_is_a_beat() -> None:
    pulse = Pulse()
    pulse.beat(3)
    pulse.clock = 10.0
    with pulse.waiting():
        pulse.clock = 14.0
        assert pulse.state() == (3, True, 4.0)
    assert pulse.state() == (3, False, 0.0)


def test_a_rank_that_fell_silent_is_named(ends: list[str]) -> None:
    (dog, _), (board, _) = two()
    dog.pulse.beat(5)
    with dog.pulse.waiting(), pytest.raises(EndedError):
        live(dog, board, 650)
    assert dog.pulse.clock == pytest.approx(600 + 30, abs=3)
    assert "has waited for others at step 5" in ends[0]
    assert "no sign of life any more (killed, frozen or cut off) from rank 1 (host1): working at step 0" in ends[0]


def test_one_waits_as_long_as_another_makes_progress(ends: list[str]) -> None:
    (dog, other), (board, its) = two()
    with dog.pulse.waiting():
        for step in range(20):
            other.pulse.beat(step)
            for _ in range(100):
                live(other, its, 1)
                live(dog, board, 1)
    assert not ends


def test_last_words_reach_the_others(ends: list[str]) -> None:
    (dog, other), (board, its) = two()
    other.pulse.last_words = "ValueError: no"
    its.publish(other.pulse)
    with dog.pulse.waiting(), pytest.raises(EndedError):
        live(dog, board, 650)
    assert "rank 1 (host1) has ended, saying: ValueError: no" in ends[0]


def test_all_waiting_for_one_another_is_a_deadlock(ends: list[str]) -> None:
    (dog, other), (board, its) = two(60)
    dog.pulse.beat(5)
    other.pulse.beat(6)

    def both() -> None:
        for _ in range(100):
            live(other, its, 1)
            live(dog, board, 1)

    with dog.pulse.waiting(), other.pulse.waiting(), pytest.raises(EndedError):
        both()
    assert "all ranks wait for one another" in ends[0]
    assert "has waited for others at step 6" in ends[0] and "both()" in ends[0]
    assert "rank 0 (host0): waiting for the others at step 5 for 89 s\nits stack" in ends[0]


def test_a_victim_that_seems_to_work_names_the_silent_rank_too(ends: list[str]) -> None:
    (dog, _), (board, _) = two()  # it waits in a collective that nobody marked: backward's, on a CPU
    with pytest.raises(EndedError):
        live(dog, board, 650)
    assert dog.pulse.clock == pytest.approx(600 + 15, abs=3)
    assert "has been at step 0" in ends[0]
    assert "no sign of life any more (killed, frozen or cut off) from rank 1" in ends[0]


def test_a_rank_that_is_stuck_ends_before_those_that_wait_for_it(ends: list[str]) -> None:
    (dog, other), (board, its) = two()

    def both() -> None:
        for _ in range(700):
            live(dog, board, 1)
            live(other, its, 1)

    with dog.pulse.waiting(), pytest.raises(EndedError):
        both()
    assert other.pulse.clock == pytest.approx(600 + 15, abs=3)
    assert "has been at step 0 for 616 s, here:" in ends[0]
    assert "rank 0 (host0): waiting for the others at step 0 for 615 s\nits stack" in ends[0]


def test_stacks_that_most_have_in_common_come_last() -> None:
    board = [sign(rank, stack) for rank, stack in enumerate(("a", "b", "a", "a", "b", "c"))]
    later = [replace(old, count=2) for old in board]
    found = to_blame(board, later, me=0)
    assert [text[-1] for text in found] == ["c", "b", "a"]
    assert found[2].startswith("rank 2 (h): working at step 7 for 60 s; rank 3 (h)")
    assert to_blame(board, [replace(late, stack="") for late in later], me=0) == []


def sign(rank: int, stack: str) -> Sign:
    return Sign(rank, "h", count=1, step=7, waits=False, seconds=60.0, last_words="", stack=stack)


def test_a_silent_store_ends_the_rank(ends: list[str]) -> None:
    (dog, _), _ = two()

    def work() -> None:
        for step in range(300):
            dog.pulse.beat(step)
            dog.tick(5)

    with pytest.raises(EndedError):
        work()
    assert dog.pulse.clock == pytest.approx(600, abs=6)
    assert "store on" in ends[0] and "has not answered for 600 s" in ends[0]


def test_only_others_are_gone() -> None:
    _, boards = two()
    before = boards[0].read()
    assert [text.split(":")[0][-14:] for text in gone(before, before, me=0)] == ["rank 1 (host1)"]
    boards[1].publish(Pulse())
    assert gone(before, boards[0].read(), me=0) == []


def test_the_thread_runs_while_it_is_entered_and_no_longer(monkeypatch: pytest.MonkeyPatch, ends: list[str]) -> None:
    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)  # `end` raises here where it never returns
    with Watchdog(0.2, Pulse()) as dog:
        for step in range(20):  # 0.4 s
            dog.pulse.beat(step)
            time.sleep(0.02)
        assert "watchdog" in names() and not ends
        time.sleep(0.5)
    assert len(ends) == 1 and "time.sleep(0.5)" in ends[0]
    with Watchdog(0.2, Pulse()):
        pass
    time.sleep(0.5)
    assert len(ends) == 1 and "watchdog" not in names()
    assert signs.board is None
