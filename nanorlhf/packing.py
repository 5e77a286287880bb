"""Packed rows: prompt and response side by side, padding on the right only.

    B sequences, R response tokens, T = prompt + response tokens, n response tokens of all rows

A causal model never looks to the right, so real tokens do not see the padding, no attention mask is
needed, and positions are 0, 1, 2, ... as in training.

    packed ids   the room : | was bright <eos> | pad pad
    hidden at             *    *    *

Response token j of a row stands at column length(prompt) + j. The hidden state one column to its
left scores it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Packed:
    """Prompt + response rows, padded on the right.

    A padding id may be any token, EOS too: only lengths are ever looked at.
    """

    ids: torch.Tensor  # [B, T]
    prompt_lengths: torch.Tensor  # [B]
    response_lengths: torch.Tensor  # [B]
    # What a policy's frozen blocks made of the ids (hf/blocks.FrozenTrunk).
    frozen_output: torch.Tensor | None = None  # [B, T, D]

    @property
    def lengths(self) -> torch.Tensor:
        """The number of real tokens of each row: [B]."""
        return self.prompt_lengths + self.response_lengths

    def __len__(self):
        return len(self.ids)

    def rows(self, index: torch.Tensor) -> "Packed":
        """The chosen rows, trimmed to their own longest."""
        part = Packed(self.ids[index], self.prompt_lengths[index], self.response_lengths[index])
        # Short rows would otherwise be as wide as the longest row of the whole batch.
        width = int(part.lengths.max())
        part.ids = part.ids[:, :width]
        if self.frozen_output is not None:
            part.frozen_output = self.frozen_output[index, :width]
        return part

    def to(self, device) -> "Packed":
        """The rows on another device, without `frozen_output`: it is made where the policy is."""
        return Packed(
            self.ids.to(device), self.prompt_lengths.to(device), self.response_lengths.to(device)
        )

    def micro_batches(
        self, size: int, tokens: int = 0, index: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Rows of similar length together, so that trimming leaves little padding: see
        micro_batches() below.

        index [m]: the rows to divide (default: all). -> a list of index tensors of rows.
        """
        if index is None:
            index = torch.arange(len(self), device=self.ids.device)
        return [index[part] for part in micro_batches(self.lengths[index], size, tokens)]


def micro_batches(
    lengths: torch.Tensor, size: int, tokens: int = 0
) -> list[torch.Tensor] | tuple[torch.Tensor, ...]:
    """Divide rows into micro-batches of similar length, the shortest rows first.

    lengths [N], in tokens -> index tensors of rows; none for no rows. A part has at most `size`
    rows. With `tokens` it has as many rows as hold at most that many tokens, padding counted; a row
    that is longer than that stands alone.
    """
    if len(lengths) == 0:  # a process may have no share of a few texts
        return []
    shortest_first = lengths.argsort(stable=True)
    if not tokens:
        return shortest_first.split(size)

    # tokens = 8, lengths 2 3 3 9: the parts are [2 3] (6 with padding), [3], and [9], too long.
    counts = [0]  # the number of rows of each part
    for length in lengths[shortest_first].tolist():
        # The new row is the longest so far, so all rows of the part are padded to its length.
        tokens_with_it = (counts[-1] + 1) * length
        if counts[-1] > 0 and tokens_with_it > tokens:
            counts.append(0)
        counts[-1] += 1
    return shortest_first.split(counts)


def pack(prompts: list[Sequence[int]], responses: list[Sequence[int]], pad_id: int = 0) -> Packed:
    """Rows of token ids, each a list or an array (Encoded.compact) -> Packed.

    There may be no rows at all: a process may have no share of a few texts.
    """
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        rows.append([*prompt, *response])
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long)
    response_lengths = torch.tensor([len(response) for response in responses], dtype=torch.long)
    return Packed(pad_rows(rows, pad_id), prompt_lengths, response_lengths)


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int = 0, side: str = "right") -> torch.Tensor:
    """Rows of numbers, filled up to the longest on one side: [B, T]. There may be no rows."""
    if not rows:
        return torch.zeros(0, 0, dtype=torch.long)
    tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=pad_id, padding_side=side)


def unflatten(flat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values [n] of the positions where the mask is True, row by row -> [B, R], 0 elsewhere."""
    zeros = torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device)
    return zeros.masked_scatter(mask, flat)


def response_mask_of(batch: Packed) -> torch.Tensor:
    """The response mask of packed rows, from their lengths: [B, R], R the longest response."""
    width = int(batch.response_lengths.max())
    # In [B, R] every response begins at column 0; in `ids` it begins behind its prompt.
    positions = torch.arange(width, device=batch.ids.device)  # [R]
    return positions < batch.response_lengths[:, None]


@dataclass
class Answers:
    """Finished answers, as text and as the sampled ids; `batch` is None where there is only text.

    Prompts are the data's own, strings or chats (chats.py).
    """

    prompts: list
    responses: list[str]
    batch: Packed | None
    rows: list[dict] | None = None  # the data's own rows, which a reward may ask for
    chat: bool = False  # prompts that are strings were users' turns in a chat template
    # {how a model reads the answers: micro-batches}. Members of an ensemble that read them alike
    # share these: texts are tokenized once.
    prepared: dict = field(default_factory=dict, repr=False)

    def __len__(self):
        return len(self.prompts)
