"""Maps each entry of a layer's activation to its row, for every token layout that layers use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradshield.errors import UsageError
from gradshield.gradients.base import DeviceBatch
from gradshield.types import Batch


class Layout:
    """Splits activations into rows, a row being one sequence or several.

    Supported are (B, T, …); (B, H, T, …), attention heads; (B·T, …), routers and experts; (1, T, …), shared by all sequences;
    and (1, M, …) inside the output head, whose input was gathered to the M positions that predict a loss token.
    """

    def __init__(self, batch: Batch, data: DeviceBatch, head: nn.Module) -> None:
        names, first, place = np.unique(batch.rows, return_index=True, return_inverse=True)
        order = np.argsort(first)
        self.rows = names[order]
        self.count, self.shape = len(names), tuple(data.ids.shape)
        rank = np.argsort(order)[place.reshape(-1)]  # (B,) number of each sequence's row
        slot = np.array([(rank[:i] == r).sum() for i, r in enumerate(rank)])
        device = data.ids.device
        self.of_sequence = torch.as_tensor(rank, device=device)
        self._slot = torch.as_tensor(slot, device=device)
        self._depth = int(slot.max()) + 1
        self._members = [torch.as_tensor(np.flatnonzero(rank == r), device=device) for r in range(self.count)]
        self._ids = data.ids
        self._head = {id(module) for module in head.modules()}
        self._predicting = batch.loss[:, 1:].nonzero()[0]  # (M,) sequence of each gathered entry
        self._entries = [
            torch.as_tensor(np.flatnonzero(rank[self._predicting] == r), device=device) for r in range(self.count)
        ]

    def gathered(self, module: nn.Module) -> bool:
        """Whether the layer sees only the positions that predict a loss token."""
        return id(module) in self._head

    def unshared(self, module: nn.Module, output: Any) -> Any:
        """Expand an output that all sequences share (learned positions), so that each gets its own gradient."""
        if not isinstance(output, Tensor) or self.gathered(module) or output.shape[:2] != (1, self.shape[1]):
            return output
        return output.expand(self.shape[0], *output.shape[1:])

    def stacks(self, module: nn.Module, x: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """``x`` and ``g`` as (R, P, D), zero where a row has no entry, with the slice of rows they cover.

        Inside the head rows come one by one: its logits are large, and their number differs by row.
        """
        if self.gathered(module):
            x, g = x.flatten(0, -2), g.flatten(0, -2)
            for r, own in enumerate(self._entries):
                yield x[own].unsqueeze(0), g[own].unsqueeze(0), slice(r, r + 1)
        else:
            yield self._stacked(module, x), self._stacked(module, g), slice(None)

    def _stacked(self, module: nn.Module, x: Tensor) -> Tensor:
        x = self.apart(module, x)
        x = x.reshape(len(x), -1, x.shape[-1])
        if self.count == len(x):
            return x
        out = x.new_zeros(self.count, self._depth, *x.shape[1:])
        out[self.of_sequence, self._slot] = x
        return out.flatten(1, 2)

    def apart(self, module: nn.Module, x: Tensor) -> Tensor:
        """(B, …) from an activation outside the head. Raises UsageError if its sequences cannot be separated."""
        count, width = self.shape
        if x.shape[:1] == (count,) and width in x.shape[1:]:
            return x
        if x.shape[:1] == (count * width,):
            return x.reshape(count, width, *x.shape[1:])
        if x.shape[:2] == (1, width):
            return x.expand(count, *x.shape[1:])
        raise UsageError(
            f"gradient norms got an activation of shape {tuple(x.shape)} from {type(module).__name__}, and rows can be "
            "separated only in (B, T, …), (B, H, T, …) or (B·T, …): use the method norms of the engine loop"
        )

    def part(self, module: nn.Module, value: Any, row: int) -> Any:
        """The row's part of an argument, in the layer's own layout; an argument without rows is returned unchanged."""
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        count, width = self.shape
        if self.gathered(module):
            return value[:, self._entries[row]]
        if value.shape[0] == count and width in value.shape[1:]:
            return value[self._members[row]]
        if value.shape[0] == count * width:
            return value.reshape(count, width, *value.shape[1:])[self._members[row]].flatten(0, 1)
        return value

    def at_tokens(self, x: Tensor, g: Tensor) -> Tensor:
        """The head's row gradients at each sequence's own tokens (B, T, D), from its inputs (1, M, D) and gradients (1, M, V)."""
        out = x.new_zeros(*self.shape, x.shape[-1])
        for own, members in zip(self._entries, self._members, strict=True):
            ids = self._ids[members].flatten()
            out[members] = (g[0, own][:, ids].mT @ x[0, own]).reshape(len(members), self.shape[1], -1)
        return out
