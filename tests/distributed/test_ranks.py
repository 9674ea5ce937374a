"""The harness itself: it returns what the ranks return, and a rank that fails fails the test, soon."""

import time

import pytest
import torch
import torch.distributed as dist

import ranks
from simclr_dist.method import distributed
from simclr_dist.method.distributed import World, all_gather, all_gather_objects, all_gather_rows, all_sum, on_rank_0
from simclr_dist.run.status import end_of
from simclr_dist.system.errors import DataError, LostRankError, PassingError, RankError


def _collectives(world: World) -> dict[str, object]:
    mine = torch.arange(world.rank + 1.0)

    def fail() -> None:
        raise DataError("only rank 0 knows")

    try:
        on_rank_0(fail)
        told = ""
    except DataError as error:
        told = str(error)
    return {
        "gathered": all_gather(mine[:1] + world.rank),
        "sum": all_sum(mine[-1]),
        "rows": all_gather_rows(mine),
        "objects": all_gather_objects(f"rank {world.rank}"),
        "told": told,
    }


def _summed_at_two_places(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randn(1003, generator=torch.Generator().manual_seed(world.rank))
    return all_sum(values), all_sum(values.roll(500)).roll(-500)


def test_a_sum_has_the_same_bits_wherever_its_elements_stand() -> None:
    # torch's own sum over 5 rows and more adds the last columns in another order.
    alone, moved = ranks.run(_summed_at_two_places, 5)[0]
    in_order = sum(torch.randn(1003, generator=torch.Generator().manual_seed(rank)) for rank in range(5))
    assert torch.equal(alone, in_order)
    assert torch.equal(moved, in_order)


class _Bucket:
    """What DDP gives a hook."""

    def __init__(self, flat: torch.Tensor) -> None:
        self._flat = flat

    def buffer(self) -> torch.Tensor:
        return self._flat


def _averaged(world: World, message_bytes: int) -> torch.Tensor:
    distributed.GLOO_MESSAGE_BYTES = message_bytes
    flat = torch.randn(1003, generator=torch.Generator().manual_seed(world.rank))
    averaged: torch.Tensor = distributed._sum_in_rank_order(None, _Bucket(flat)).wait()  # type: ignore[arg-type]
    return averaged


@pytest.mark.parametrize("message_bytes", [4, 100, 2**19])
def test_gradients_have_the_same_bits_in_messages_of_any_size(message_bytes: int) -> None:
    of_ranks = [torch.randn(1003, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
    expected = (of_ranks[0] + of_ranks[1] + of_ranks[2]) / 3
    for averaged in ranks.run(_averaged, 3, message_bytes):
        assert torch.equal(averaged, expected)


def test_collectives_in_rank_order() -> None:
    for result in ranks.run(_collectives, 3):
        assert result["gathered"].tolist() == [[0], [1], [2]]
        assert result["sum"] == 3
        assert result["rows"].tolist() == [0, 0, 1, 0, 1, 2]
        assert result["objects"] == ["rank 0", "rank 1", "rank 2"]
        assert result["told"] == "only rank 0 knows"


def test_a_failing_rank_ends_all() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1:(.|\n)*as it should"):
        ranks.run(ranks.failing, 2)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(("given", "kind"), [("0,1,2,3", PassingError), ("0,1,2", RankError), ("", RankError)])
def test_a_gpu_that_was_given_and_is_not_there_may_be_there_in_the_next_start(
    monkeypatch: pytest.MonkeyPatch, given: str, kind: type[RankError]
) -> None:
    """On another machine, when SLURM has taken the broken one out. One that was never given is a mistake."""
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "n1", "MASTER_PORT": "1", "SLURM_JOB_ID": "7"}
    for name, value in (place | {"CUDA_VISIBLE_DEVICES": given}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    with pytest.raises(RankError, match="needs GPU 3, of 3 here") as refused, distributed.process_group("cuda"):
        pass
    assert type(refused.value) is kind
    assert end_of(refused.value).code == (1 if kind is PassingError else 2)


@pytest.mark.parametrize(("given", "job"), [("0", "7"), ("0", None), ("", "7"), ("-1", "7"), ("NoDevFiles", "7")])
def test_a_job_with_gpus_does_not_train_on_the_cpu_where_cuda_is_gone(
    monkeypatch: pytest.MonkeyPatch, given: str, job: str | None
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    if given == "0" and job:
        with pytest.raises(PassingError, match=r"^device: 'auto': rank 0 needs GPU 0, of 0 here$"), distributed.process_group():
            pass
    else:
        with distributed.process_group() as world:
            assert world.device.type == "cpu"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer"),
        dist.DistNetworkError("The client socket has timed out"),
        dist.DistBackendError("NCCL communicator was aborted"),
    ],
)
def test_a_lost_rank_is_told_from_an_error_of_the_rank_itself(error: RuntimeError) -> None:
    with pytest.raises(LostRankError, match=str(error).split()[-1]), distributed.lost_ranks_named():
        raise error
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), TimeoutError("timed out"), DataError("x")):
        with pytest.raises(type(other)) as caught, distributed.lost_ranks_named():
            raise other
        assert caught.value is other
