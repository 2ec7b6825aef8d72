"""Where in a sequence something is predicted: how far a model can look there, and means over distances."""

from typing import Any

import numpy as np
from models import text_config
from transformers import PreTrainedModel


def usable_positions(model: PreTrainedModel) -> int | None:
    """Number of tokens that the model has positions for; None if it takes texts of any length."""
    positions = getattr(text_config(model.config), "max_position_embeddings", None)
    # XLNet, whose positions are relative, gives -1.
    if positions is None or positions < 1:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            # RoBERTa and its relatives count positions from the one after that of padding.
            positions = min(positions, module.weight.shape[0] - module.padding_idx - 1)
    return positions


def position_limit(model: PreTrainedModel) -> int | None:
    """Number of tokens after which the model's position table ends; None if it has none.

    Rotary positions are computed for any length, whatever `max_position_embeddings` says.
    """
    if any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        return None
    return usable_positions(model)


def beyond_positions(length: int, limit: int | None) -> str | None:
    """Why a model whose table ends at `limit` cannot read `length` tokens; None if it can."""
    return f"its position table ends at {limit} tokens" if limit is not None and length > limit else None


def mean_by_distance(distances: np.ndarray, values: np.ndarray) -> list[dict[str, Any]]:
    """Means of values over distances from 1, from 2 to 3, from 4 to 7, ...

    Args:
        distances: (N,) integers from 1.
        values: (N,) floats.

    Returns:
        for each such range with values in it: `first` and `last` distance, `count` and `mean` of its values.
    """
    means = []
    for first in 2 ** np.arange(int(distances.max(initial=0)).bit_length()):
        inside = values[(distances >= first) & (distances < 2 * first)]
        if inside.size:
            mean = float(inside.mean(dtype=np.float64))
            means.append({"first": int(first), "last": 2 * int(first) - 1, "count": inside.size, "mean": mean})
    return means
