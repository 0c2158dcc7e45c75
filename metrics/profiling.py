"""What the parts of a model cost: seconds, FLOPs, and the share of the machine's own matmul rate.

    python evaluate.py speed --frames=64 --weights=weights      # one video, from an ECG alone
"""
import math
import sys
import time
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from common.training import bfloat16

SIZE, REPEATS = 2048, 8     # of the square matrices whose product gives the rate


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def clock(device):
    """Gives a function that tells the seconds of what ran inside."""
    wait(device)
    began = time.perf_counter()
    yield lambda: seconds
    wait(device)
    seconds = time.perf_counter() - began


@contextmanager
def flops():
    """Gives a function that tells the floating-point operations of matrix products, convolutions and
    attention inside; torch itself does not count the attention of its CPU kernel."""
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
                 lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        yield counter.get_total_flops


def measure_parts(run, methods, meter):
    """What run() costs, and what of it all calls of each of the `methods`, (object, name): a list, the
    whole first. The meter is flops or clock."""
    costs = [0] * (1 + len(methods))

    def metered(k, function):
        def call(*args, **kwargs):
            with meter() as read:
                result = function(*args, **kwargs)
            costs[k] += read()
            return result
        return call

    with ExitStack() as stack:
        for k, (part, name) in enumerate(methods, 1):
            stack.enter_context(patch.object(part, name, metered(k, getattr(part, name))))
        metered(0, run)()
    return costs


@torch.no_grad()
def matmul_rate(device):
    """Operations a second of a square matrix product, in the type that the models compute in there; the best
    of a few."""
    a = torch.randn(SIZE, SIZE, device=device)
    best = math.inf
    with bfloat16(device):
        a = torch.mm(a, a) / SIZE       # of that type
        for _ in range(REPEATS):
            with clock(device) as read:
                torch.mm(a, a)
            best = min(best, read())
    return 2 * SIZE ** 3 / best


def peak_memory(device):
    """Bytes: of the GPU, else of the process; nan where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
