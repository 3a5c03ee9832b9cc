from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_pool import RankPools
from torch import nn

from distckpt.trainer.evaluation import Evaluation, evaluate, test_batches
from distckpt.trainer.optimization import Precision
from distckpt.trainer.process import Process, joined

NUM_TEST, NUM_CLASSES = 53, 7


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(5)
    return torch.randn(NUM_TEST, 4, generator=chance), torch.randint(0, NUM_CLASSES, (NUM_TEST,), generator=chance)


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, NUM_CLASSES))


def evaluated(
    trained: nn.Module, process: Process, *, batch_size: int, stopping: Callable[[], bool] = lambda: False
) -> Evaluation | None:
    images, labels = samples()

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for indices in test_batches(NUM_TEST, batch_size, process):
            yield images[indices], labels[indices]

    precision = Precision("fp32", process.device)
    return evaluate(
        trained, batches(), num_classes=NUM_CLASSES, precision=precision, process=process, stopping=stopping
    )


def break_off(stopped: int, after: int) -> tuple[Evaluation | None, int]:
    """Let one rank be told to stop after so many batches; return its result, and how often this rank asked."""
    with joined(timeout_s=60) as process:
        num_asked = 0

        def stopping() -> bool:
            nonlocal num_asked
            num_asked += 1
            return process.rank == stopped and num_asked > after

        return evaluated(model(), process, batch_size=6, stopping=stopping), num_asked


@pytest.mark.parametrize("stopped", [0, 1])
def test_an_evaluation_that_one_rank_breaks_off_has_no_result_on_any(ranks: RankPools, stopped: int) -> None:
    found = ranks(2).run(break_off, stopped, 2)
    assert [result for result, _ in found] == [None, None]
    assert found[stopped][1] == 3


def test_an_evaluation_that_nobody_breaks_off_asks_before_each_batch(ranks: RankPools) -> None:
    for result, num_asked in ranks(2).run(break_off, 0, 1000):
        assert result is not None
        assert num_asked == 5


def evaluate_on_ranks() -> tuple[Evaluation | None, bool, bool]:
    """Return the evaluation, whether the random numbers are as before, and whether the model still trains."""
    with joined(timeout_s=60.0) as process:
        trained = model()
        if process.rank != 0:  # each rank has seen samples of its own, and only rank 0's statistics count
            trained(torch.randn(16, 4) * 9)
        before = torch.get_rng_state()
        found = evaluated(trained, process, batch_size=6)
        means = [torch.zeros(8) for _ in range(process.world_size)]
        norm = trained[1]  # type: ignore[index]
        dist.all_gather(means, norm.running_mean)
        assert all(torch.equal(mean, means[0]) for mean in means)
        return found, torch.equal(before, torch.get_rng_state()), trained.training


def by_hand() -> Evaluation:
    images, labels = samples()
    with torch.no_grad():
        logits = model().eval()(images)
    order = logits.argsort(dim=1, descending=True)
    right = order[:, 0] == labels
    return Evaluation(
        loss=F.cross_entropy(logits.double(), labels).item(),
        top1=right.double().mean().item(),
        top5=sum(int(labels[index]) in order[index, :5].tolist() for index in range(NUM_TEST)) / NUM_TEST,
        num_samples=tuple(int((labels == label).sum()) for label in range(NUM_CLASSES)),
        num_right=tuple(int(right[labels == label].sum()) for label in range(NUM_CLASSES)),
    )


def assert_same(found: Evaluation, expected: Evaluation) -> None:
    assert (found.num_samples, found.num_right) == (expected.num_samples, expected.num_right)
    assert (found.top1, found.top5) == (expected.top1, expected.top5)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 10, 100])
def test_an_evaluation_is_what_one_counts_by_hand(batch_size: int) -> None:
    process = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    found = evaluated(model(), process, batch_size=batch_size)
    assert_same(found, by_hand())
    assert found.metrics() == {"val/loss": found.loss, "val/top1": found.top1, "val/top5": found.top5}
    assert 0 < found.top1 < found.top5 < 1


def test_ranks_together_count_every_sample_once_with_the_statistics_of_rank_0(ranks: RankPools) -> None:
    results = ranks(3).run(evaluate_on_ranks)
    for found, random_numbers_kept, still_training in results:
        assert_same(found, by_hand())
        assert random_numbers_kept
        assert still_training


@pytest.mark.parametrize(("num_test", "world_size"), [(0, 2), (1, 3), (10, 4), (53, 3)])
def test_the_ranks_batches_are_all_samples_each_once(num_test: int, world_size: int) -> None:
    device = torch.device("cpu")
    found = [
        index
        for rank in range(world_size)
        for batch in test_batches(
            num_test, 4, Process(rank=rank, world_size=world_size, local_rank=rank, device=device)
        )
        for index in batch
    ]
    assert found == list(range(num_test))


def test_fewer_than_five_classes_have_a_top_5_of_one() -> None:
    process = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    batches = [(torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))]
    found = evaluate(
        nn.Linear(4, 3), batches, num_classes=3, precision=Precision("fp32", process.device), process=process
    )
    assert found is not None
    assert found.top5 == 1
