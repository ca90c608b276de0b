"""Before training: can any model reach the target on these windows?

floor = entropy_floor(ids, starts, context_length=64)   # nats per token
"""

from collections import Counter

import numpy as np


def entropy_floor(ids: np.ndarray, starts: np.ndarray, context_length: int) -> float:
    """The lowest mean loss, in nats per token, that any model can have on the windows of ids (N,) at starts (W,).

    The first tokens of a window have little context, and no model can predict what the windows leave open. The best
    possible model gives each next token its share among the windows that began alike; over a window these shares
    multiply to count(window) / count(first token), so the sum over positions telescopes and no prefix needs counting.
    """
    ids = np.ascontiguousarray(ids, dtype=np.int32)
    width = ids.itemsize
    data = ids.tobytes()
    first = Counter(ids[starts].tolist())
    whole = Counter(data[s * width : (s + context_length + 1) * width] for s in starts.tolist())
    log_ratio = sum(n * np.log(n) for n in first.values()) - sum(n * np.log(n) for n in whole.values())
    return float(log_ratio) / (len(starts) * context_length)
