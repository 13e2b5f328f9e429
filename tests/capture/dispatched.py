"""A model whose attention goes through diffusers' dispatcher, with packages replaced by stand-ins."""

import warnings
from contextlib import contextmanager

import kernel_stand_ins
import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from star_kernels.capture import attention_call, capture_maps

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 12, 8
ROWS = {"rows": (4, 6), "grid": (2, 3)}


class Processor:
    """Attends to given queries, keys and values through diffusers' dispatcher."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, backend=None):
        self._attention_backend = backend

    def __call__(self, module, options):
        return dispatch_attention_fn(*module.qkv, backend=self._attention_backend, **options)


class Attention(nn.Module):
    def __init__(self, backend, key_heads):
        super().__init__()
        self.qkv = [torch.randn(BATCH, LENGTH, heads, WIDTH) for heads in (HEADS, key_heads, key_heads)]
        self.processor = Processor(backend)

    def forward(self, options):
        return self.processor(self, options)


class Model(nn.Module):
    def __init__(self, backend=None, key_heads=HEADS):
        super().__init__()
        self.attention = Attention(backend, key_heads)

    def forward(self, **options):
        return self.attention(options)

    def exact(self, mask=None):
        """What exact attention computes with a mask."""
        query, key, value = (t.transpose(1, 2) for t in self.attention.qkv)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)

    def call(self, mask=None, scale=1.0):
        """For map_of."""
        query, key, _ = (t.transpose(1, 2) for t in self.attention.qkv)
        return query * scale, key.repeat_interleave(HEADS // key.shape[1], dim=1), mask


def padding():
    return torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 3]])


def captured(model, selection, **options):
    """The output and the maps [B, G, R] of a captured call."""
    with warnings.catch_warnings(action="ignore"), capture_maps(model, selection, cfg=None, **ROWS) as maps:
        out = model(**options)
    return out, maps.value.flatten(2)


@contextmanager
def stand_ins():
    """Packages by stand-ins, and nothing verified or announced yet."""
    with pytest.MonkeyPatch.context() as patch:
        kernel_stand_ins.install(patch)
        patch.setattr(attention_call, "_verified", set())
        patch.setattr(attention_call, "_warned", set())
        yield
