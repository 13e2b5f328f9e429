"""Which part of a pass's batch a selection is for: all of it, or the conditional half of one doubled for guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels.selection import TokenSelection

CHOICES = ("auto", "last", "first", None)


class Guidance:
    """A selection, and the same for batches doubled for classifier-free guidance.

    Args:
        cfg: what the user chose.
        family: which half is conditional where the family's pipelines double the batch; None where they do not.
    """

    def __init__(self, cfg: str | None, family: str | None) -> None:
        self._cfg, self._family = cfg, family
        self._selection: TokenSelection | None = None
        self._doubled: dict[str, TokenSelection] = {}
        self._compared = False  # the halves of a pass with this selection

    @property
    def selection(self) -> TokenSelection | None:
        return self._selection

    @selection.setter
    def selection(self, selection: TokenSelection | None) -> None:
        self._selection, self._doubled, self._compared = selection, {}, False

    def of_pass(self, selection: TokenSelection, arguments: dict[str, Any]) -> tuple[TokenSelection, slice, str]:
        """For a pass: the selection for its whole batch, the part that it is for, and an error's words on the batch.

        Args:
            arguments: of the model, the latent first, as in diffusers.

        Raises:
            ValueError: cfg is "auto", and a batch of twice the selection's is not one doubled for guidance.
        """
        batch = selection.batch
        cfg = self._half(selection, arguments) if self._cfg == "auto" else self._cfg
        if cfg is None:
            return selection, slice(None), self._expected()
        if cfg not in self._doubled:
            before, after = (batch, 0) if cfg == "last" else (0, batch)
            self._doubled[cfg] = selection.among_empty(before, after)
        part = slice(batch, None) if cfg == "last" else slice(batch)
        return self._doubled[cfg], part, f" (twice the selection's {batch}, for cfg={self._cfg!r})"

    def _expected(self) -> str:
        if self._cfg is None:
            return ""
        if self._family is not None:
            return ", the selection's, or twice that for guidance"
        return ", the selection's (one doubled for guidance needs cfg='last' or 'first')"

    def _half(self, selection: TokenSelection, arguments: dict[str, Any]) -> str | None:
        latent = next(iter(arguments.values()), None)
        batch = selection.batch
        if self._family is None or not isinstance(latent, Tensor) or len(latent) != 2 * batch:
            return None
        first, last = latent.chunk(2)
        same = ((first == last) | first.isnan()).all()  # a diverged run is not this error
        message = (
            f"a batch of {2 * batch} for a selection of {batch} is taken as doubled for guidance (cfg='auto'), and its "
            "halves must then have the same latents, which differ here. Where it is not doubled, as for several images "
            "of each prompt, select for every sample; where it is, give cfg='last' or 'first'"
        )
        if latent.device.type == "cuda" and self._compared:
            torch._assert_async(same, message)
        elif not latent.is_meta and not bool(same):
            raise ValueError(message)
        self._compared = True
        return self._family
