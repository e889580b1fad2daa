"""Which block goes where: batch k of rank r is a pure function of (seed, k, r, number of ranks).

Training. Let n be the number of blocks, G = batch size × ranks the blocks of one global batch and N = ⌊n / G⌋ the
batches of one pass. Pass e visits the blocks in the order π(e), a permutation drawn from (seed, e); global batch
k = e·N + j is π(e)[j·G : (j+1)·G], of which rank r takes the r-th slice. The n - N·G blocks left over differ from pass
to pass. Nothing is remembered between batches, so resuming needs one number: k, the count of batches that were
trained on, which Lightning's checkpoints hold already and which is the same on every rank.

Evaluation. Every block exactly once over all ranks, in order; every rank makes the same number of equal batches
(FSDP's collectives need that). Places beyond the last block hold -1, which the dataset turns into a padding row.

Both derive from ``DistributedSampler`` only because Lightning leaves such a sampler alone, whatever
``trainer.use_distributed_sampler`` says.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

PADDING = -1


class TrainSampler(DistributedSampler[int]):
    """Indices of this rank's blocks, from batch ``cursor()`` on, for as many batches as a pass has.

    Args:
        blocks: The training blocks.
        batch_size: Blocks of one batch on one rank.
        num_ranks: Number of ranks.
        rank: This rank.
        seed: Seed of the permutations.
        cursor: Number of batches trained on so far, over all passes; asked at every start of an iteration.
    """

    def __init__(
        self, blocks: Dataset, batch_size: int, num_ranks: int, rank: int, seed: int, cursor: Callable[[], int]
    ) -> None:
        super().__init__(blocks, num_ranks, rank, seed=seed)
        self.num_blocks, self.batch_size, self.cursor = len(blocks), batch_size, cursor  # type: ignore[arg-type]
        self.num_batches = self.num_blocks // (batch_size * num_ranks)

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def permutation(self, pass_index: int) -> np.ndarray:
        return np.random.default_rng((self.seed, pass_index)).permutation(self.num_blocks)

    def global_batch(self, k: int) -> list[int]:
        """The blocks of global batch k, those of rank 0 first."""
        pass_index, j = divmod(k, self.num_batches)
        size = self.num_replicas * self.batch_size
        return self.permutation(pass_index)[j * size : (j + 1) * size].tolist()

    def __iter__(self) -> Iterator[int]:
        first, order, order_pass = self.cursor(), np.empty(0, np.int64), -1
        for k in range(first, first + self.num_batches):
            pass_index, j = divmod(k, self.num_batches)
            if pass_index != order_pass:
                order, order_pass = self.permutation(pass_index), pass_index
            start = (j * self.num_replicas + self.rank) * self.batch_size
            yield from order[start : start + self.batch_size].tolist()


class EvalSampler(DistributedSampler[int]):
    """Indices of this rank's blocks in order, then ``PADDING`` until all ranks have the same number of full batches."""

    def __init__(self, blocks: Dataset, batch_size: int, num_ranks: int, rank: int) -> None:
        super().__init__(blocks, num_ranks, rank, shuffle=False)
        self.num_blocks, self.batch_size = len(blocks), batch_size  # type: ignore[arg-type]
        self.num_batches = math.ceil(self.num_blocks / (batch_size * num_ranks))

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        for j in range(self.num_batches):
            start = (j * self.num_replicas + self.rank) * self.batch_size
            yield from (i if i < self.num_blocks else PADDING for i in range(start, start + self.batch_size))
