"""Attention sinks: tokens whose residual stream is many times as long as that of their neighbours.

    t is a sink if |x_t| > ratio * median |x_s| over the pooled tokens s of its window

A model parks the attention that it has no use for on a few tokens, often the first of a text or a line break, and marks
them with huge numbers in a few directions (Sun et al. 2024, "Massive Activations in Large Language Models"). What an
SAE puts out there says nothing of the text, and one such token is enough to make a maximum over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def sink_tokens(residual: Float[Tensor, "N d_model"], bounds: Sequence[int], ratio: float) -> Bool[Tensor, " N"]:
    """Which tokens are sinks; run r, the tokens of one window, has those from bounds[r] to bounds[r + 1].

    The median is the lower of the two in the middle, so that of two tokens one can be a sink. With `ratio` > 1 at
    least one token of each run is none. Lengths that are not finite are no sinks: they are an error, which whoever
    reads the activations must see.
    """
    norms = residual.float().norm(dim=-1).cpu()
    medians = torch.stack([norms[first:stop].median() for first, stop in pairwise(bounds)])
    limits = ratio * medians.repeat_interleave(torch.tensor(bounds).diff())
    return ((norms > limits) & norms.isfinite()).to(residual.device)
