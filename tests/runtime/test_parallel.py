from __future__ import annotations

import pytest
import torch
from torch import nn

from tbcm.errors import UserError
from tbcm.runtime import distributed, parallel


def test_one_rank_is_left_as_it_is() -> None:
    net = nn.Linear(2, 2)
    for mode in ("ddp", "fsdp"):
        assert parallel.parallelize(net, [], mode, None, torch.device("cpu")) is net
    assert not parallel.is_sharded(net)


def test_a_student_is_sharded_over_a_node_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 32)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [parallel.shard_size(shard) for shard in (None, 16, 32, 1)] == [8, 16, 32, 1]
    with pytest.raises(UserError, match=r"parallel\.shard = 12: should divide the number of ranks, 32"):
        parallel.shard_size(12)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert parallel.shard_size(None) == 32
