"""The selection of a forward pass: where its text starts in the keys, and which part of its batch is conditional."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels.selection import TokenSelection

CHOICES = ("auto", "last", "first", None)


class Guidance:
    """A selection of text, as positions of keys for batches that are doubled for classifier-free guidance or are not.

    Args:
        cfg: the user's choice, see :func:`star_kernels.capture.attach_maps`.
        family: which half is conditional if the family's pipelines double the batch; None if they do not.
    """

    def __init__(self, cfg: str | None, family: str | None) -> None:
        self._cfg, self._family = cfg, family
        self._selection: TokenSelection | None = None
        self._made: dict[tuple[str | None, int], TokenSelection] = {}  # by the conditional half and the start
        self._compared = False  # whether the halves of a batch with this selection were compared

    @property
    def selection(self) -> TokenSelection | None:
        return self._selection

    @selection.setter
    def selection(self, selection: TokenSelection | None) -> None:
        self._selection, self._made, self._compared = selection, {}, False

    def for_pass(
        self, selection: TokenSelection, arguments: dict[str, Any], start: int
    ) -> tuple[TokenSelection, slice, str]:
        """The selection for the whole batch of a pass, the part of the batch that the user's selection is for, and
        words for an error message about the batch size.

        Args:
            selection: the user's.
            arguments: of the model's forward pass by name, the latent first, as in diffusers.
            start: the key at which the text starts.

        Raises:
            ValueError: cfg is "auto", and the batch has twice the size of the selection's but is not doubled for
                guidance.
        """
        batch = selection.batch
        cfg = self._half(selection, arguments) if self._cfg == "auto" else self._cfg
        whole = self._made.get((cfg, start))
        if whole is None:
            whole = self._made[cfg, start] = _for_batch(selection, cfg, start)
        if cfg is None:
            return whole, slice(None), self._expected()
        part = slice(batch, None) if cfg == "last" else slice(batch)
        return whole, part, f" (twice the selection's {batch}, for cfg={self._cfg!r})"

    def _expected(self) -> str:
        if self._cfg is None:
            return ""
        if self._family is not None:
            return ", the selection's, or twice that for guidance"
        return ", the selection's (a batch doubled for guidance needs cfg='last' or 'first')"

    def _half(self, selection: TokenSelection, arguments: dict[str, Any]) -> str | None:
        latent = next(iter(arguments.values()), None)
        batch = selection.batch
        if self._family is None or not isinstance(latent, (Tensor, list, tuple)) or len(latent) != 2 * batch:
            return None
        if not isinstance(latent, Tensor):  # Z-Image: a list of latents of one size
            latent = torch.stack(tuple(latent))
        first, last = latent.chunk(2)
        same = ((first == last) | first.isnan()).all()  # NaN of a diverged run is not this error
        message = (
            f"a batch of {2 * batch} for a selection of {batch} is assumed to be doubled for guidance (cfg='auto'), "
            "but the latents of its halves differ. If it is not doubled, for example because of several images of each "
            "prompt, the selection needs an entry for every sample; if it is, pass cfg='last' or cfg='first'"
        )
        if latent.device.type == "cuda" and self._compared:
            torch._assert_async(same, message)
        elif not latent.is_meta and not bool(same):
            raise ValueError(message)
        self._compared = True
        return self._family


@torch.inference_mode(False)  # autograd saves it in later passes
def _for_batch(selection: TokenSelection, cfg: str | None, start: int) -> TokenSelection:
    if start:
        selection = selection.shift(start)
    if cfg is None:
        return selection
    before, after = (selection.batch, 0) if cfg == "last" else (0, selection.batch)
    return selection.among_empty(before, after)
