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
        self._made: dict[tuple[int, int, int], TokenSelection] = {}  # see _among
        self._compared = False  # whether the halves of a batch with this selection were compared

    @property
    def selection(self) -> TokenSelection | None:
        return self._selection

    @selection.setter
    def selection(self, selection: TokenSelection | None) -> None:
        self._selection, self._made, self._compared = selection, {}, False

    def for_pass(
        self, selection: TokenSelection, arguments: dict[str, Any], start: int, pag: str | None = None
    ) -> tuple[TokenSelection, slice, str]:
        """The selection for the whole batch of a pass, the part of the batch that the user's selection is for, and
        words for an error message about the batch size.

        Args:
            selection: the user's.
            arguments: of the model's forward pass by name, the latent first, as in diffusers.
            start: the key at which the text starts.
            pag: the class of the model's attention processors for perturbed-attention guidance, if it has any.

        Raises:
            ValueError: cfg is "auto", and the batch has twice the size of the selection's but is not doubled for
                guidance; or cfg is a part of the batch whose attention is perturbed.
        """
        batch = selection.batch
        if pag is not None and self._cfg in ("auto", "last"):
            return self._beside_perturbed(selection, start, pag)
        cfg = self._half(selection, arguments) if self._cfg == "auto" else self._cfg
        if cfg is None:
            return self._among(selection, start, 0, 0), slice(None), self._expected()
        before, after = (batch, 0) if cfg == "last" else (0, batch)
        words = f" (twice the selection's {batch}, for cfg={self._cfg!r})"
        return self._among(selection, start, before, after), slice(before, before + batch), words

    def _beside_perturbed(self, selection: TokenSelection, start: int, pag: str) -> tuple[TokenSelection, slice, str]:
        """As :meth:`for_pass`, for a batch of [unconditional, conditional, perturbed] or [conditional, perturbed]."""
        if self._cfg == "last":
            raise ValueError(
                f"cfg='last' is the part of the batch whose attention is perturbed ({pag}): pass cfg='auto'"
            )
        batch, guided = selection.batch, pag.startswith("PAGCFG")
        before = batch if guided else 0
        words = f" ({3 if guided else 2} times the selection's, for perturbed-attention guidance by {pag})"
        return self._among(selection, start, before, batch), slice(before, before + batch), words

    def _among(self, selection: TokenSelection, start: int, before: int, after: int) -> TokenSelection:
        """The selection as positions of keys, with so many samples before and after it that select nothing."""
        made = self._made.get((start, before, after))
        if made is None:
            with torch.inference_mode(False):  # autograd saves it in later passes
                made = selection.differentiable()
                made = made.shift(start) if start else made
                made = made.among_empty(before, after) if before or after else made
            self._made[start, before, after] = made
        return made

    def _expected(self) -> str:
        if self._cfg is None:
            return ", the selection's"
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
