"""Packed rows: prompt and response side by side, padding on the right only.

    B sequences, R response tokens, T = prompt + response tokens, n response tokens of all rows

A causal model never looks to the right, so real tokens do not see the padding, no attention mask is needed, and positions are
0, 1, 2, ... as in training.

    packed ids   the room : | was bright <eos> | pad pad          response token j of a row stands at column length(prompt) + j,
    hidden at             *    *    *                             and is scored by the hidden state one column to its left
"""

from dataclasses import dataclass, field

import torch


@dataclass
class Packed:
    """Prompt + response rows, padded on the right. A padding id may be any token, EOS too: only lengths are ever looked at."""

    ids: torch.Tensor  # [B, T]
    prompt_lengths: torch.Tensor  # [B]
    response_lengths: torch.Tensor  # [B]
    trunk: torch.Tensor | None = None  # [B, T, D]: what a policy's frozen blocks made of the ids (blocks.FrozenTrunk)

    @property
    def lengths(self):
        return self.prompt_lengths + self.response_lengths  # [B]

    def __len__(self):
        return len(self.ids)

    def rows(self, index):
        """The chosen rows, trimmed to their own longest."""
        part = Packed(self.ids[index], self.prompt_lengths[index], self.response_lengths[index])
        width = int(part.lengths.max())
        part.ids = part.ids[:, :width]
        part.trunk = None if self.trunk is None else self.trunk[index, :width]
        return part

    def to(self, device):
        return Packed(self.ids.to(device), self.prompt_lengths.to(device), self.response_lengths.to(device))

    def micro_batches(self, size, index=None, tokens=0):
        """Index tensors of rows of similar length, so that trimming leaves little padding: see micro_batches()."""
        index = torch.arange(len(self), device=self.ids.device) if index is None else index
        return [index[part] for part in micro_batches(self.lengths[index], size, tokens)]


def micro_batches(lengths, size, tokens=0):
    """Places of `lengths` [N], shortest first, in parts of at most `size` rows; or, with `tokens`, in as few parts as hold at most that
    many tokens each, padding counted (a row that is longer stands alone)."""
    order = lengths.argsort(stable=True)
    if not tokens:
        return order.split(size)
    counts = [0]
    for length in lengths[order].tolist():
        if counts[-1] and (counts[-1] + 1) * length > tokens:
            counts.append(0)
        counts[-1] += 1
    return order.split(counts)


def pack(prompts, responses, pad_id=0):
    """Lists of token lists -> Packed. No rows are none too: a process may have no share of a few texts."""
    rows = [list(p) + list(r) for p, r in zip(prompts, responses, strict=True)]
    width = max(map(len, rows), default=0)
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], dtype=torch.long).view(len(rows), width)
    prompt_lengths = torch.tensor([len(p) for p in prompts], dtype=torch.long)
    response_lengths = torch.tensor([len(r) for r in responses], dtype=torch.long)
    return Packed(ids, prompt_lengths, response_lengths)


def unflatten(flat, mask):
    """[n] values of the masked positions, row by row -> [B, R], 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def response_mask_of(batch, width=None):
    """[B, R] from the lengths of packed rows; R is the longest response or `width`."""
    width = int(batch.response_lengths.max()) if width is None else width
    return torch.arange(width, device=batch.ids.device) < batch.response_lengths[:, None]


@dataclass
class Answers:
    """Finished answers, as text and as the sampled ids; `batch` is None where there is only text."""

    prompts: list[str]
    responses: list[str]
    batch: Packed | None
    micro_batches: dict = field(default_factory=dict, repr=False)  # tokenized once for all members of an ensemble

    def __len__(self):
        return len(self.prompts)
