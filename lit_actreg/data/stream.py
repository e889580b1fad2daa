"""Training on a stream: documents are read, tokenized and packed while training, and nothing is stored.

For a look at a corpus too large to keep. A stream's first documents are read ahead, packed and cached as of any
corpus: they give the tokenizer, the validation and test blocks, the calibration batches and the token counts. The
training stream leaves out the documents that are held out (by the same hash), is shuffled in a buffer of documents,
split over ranks by ``datasets.distributed.split_dataset_by_node``, and begins anew, in another order, when it ends.

Resume is exact too, but not free: the sequences already trained on are produced again and skipped, at the speed of one
tokenizing process a rank (about half a million tokens a second). Long trainings on one corpus do better to pack it:
that is done once, on every core, and a packed corpus resumes at once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import IterableDataset

from lit_actreg.data.corpus import DOCUMENTS_PER_READ, Split, held_out, mix, reading
from lit_actreg.data.packed import Encoder, cut
from lit_actreg.data.resume import ResumableLoader

SHUFFLE_BUFFER = 1000  # documents


def training_stream(
    parts: list[dict[Split, datasets.IterableDataset]],
    weights: list[float] | None,
    valid_share: float | None,
    seed: int,
    rank: int,
    num_ranks: int,
) -> datasets.IterableDataset:
    """This rank's training documents: what is not held out of each source, mixed, shuffled, split over ranks.

    ``valid_share`` None holds nothing out by hash (validation has a source of its own).
    """
    streams = []
    for part in parts:
        stream = part["train"]
        if valid_share is not None and "valid" not in part:
            stream = stream.filter(lambda batch: (held_out(batch["text"], valid_share) == 0).tolist(), batched=True)
        streams.append(stream)
    mixed = mix(streams, weights, seed).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return split_dataset_by_node(mixed, rank, num_ranks)


class StreamedBlocks(IterableDataset[Tensor]):
    """Blocks of a stream without end, from number ``first_block`` on: int64 [context + 1] each.

    Args:
        documents: This rank's documents, one column "text".
        encoder: Texts to ids.
        context: Tokens of a training sequence.
        name: Of the sources, for errors.
    """

    def __init__(self, documents: datasets.IterableDataset, encoder: Encoder, context: int, name: str) -> None:
        self.documents, self.encoder, self.length, self.name = documents, encoder, context + 1, name
        self.first_block = 0

    def pieces(self) -> Iterator[Any]:
        """Ids of batches of documents, pass after pass."""
        pass_index = 0
        while True:
            self.documents.set_epoch(pass_index)
            empty = True
            for batch in self._read():
                for ids in self.encoder(batch["text"]):
                    empty = False
                    yield ids
            if empty:
                raise ValueError("data.source streams no training document to this rank: give more text, or pack it")
            pass_index += 1

    def _read(self) -> Iterator[Any]:
        with reading(self.name):
            yield from self.documents.iter(batch_size=DOCUMENTS_PER_READ)

    def __iter__(self) -> Iterator[Tensor]:
        skip = self.first_block
        for blocks in cut(self.pieces(), self.length):
            yield from torch.from_numpy(blocks[skip:].astype("int64"))
            skip = max(0, skip - len(blocks))


class StreamLoader(ResumableLoader):
    """Batches of a stream from batch ``cursor()`` on; one worker process at most, so that their order is one stream's.

    Args:
        order: As of :class:`ResumableLoader`.
        blocks: This rank's stream.
        batch_size: Sequences a batch.
        cursor: Number of batches trained on so far; asked at every start of an iteration.
        options: As of ``DataLoader``.
    """

    def __init__(
        self,
        order: dict[str, int | str],
        blocks: StreamedBlocks,
        batch_size: int,
        cursor: Callable[[], int],
        **options: Any,
    ) -> None:
        super().__init__(order, dataset=blocks, batch_size=batch_size, collate_fn=torch.stack, **options)
        self.blocks, self.cursor = blocks, cursor

    def __iter__(self) -> Any:
        assert self.batch_size is not None
        self.blocks.first_block = self.cursor() * self.batch_size  # before a worker process copies the dataset
        return super().__iter__()
