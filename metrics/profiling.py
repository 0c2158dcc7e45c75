"""What the parts of a model cost: seconds, FLOPs, the matmul rate; for evaluate.py speed."""
import math
import sys
import time
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.utils.flop_counter import (FlopCounterMode, sdpa_backward_flop_count,
                                      sdpa_flop_count)

from common.training import bfloat16

# Side of the square matrices whose product gives the machine's rate. A GPU needs large ones: the
# product of small ones is over before the next one has started.
MATRIX_SIZE = {"cuda": 8192, "cpu": 2048}
REPEATS = {"cuda": 100, "cpu": 8}       # of that product; the fastest counts


def wait(device):
    """Wait until a GPU has done what it was given: it works in the background."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def clock(device):
    """Gives a function that returns, afterwards, the seconds of what ran inside the with block."""
    wait(device)
    began = time.perf_counter()
    yield lambda: seconds
    wait(device)
    seconds = time.perf_counter() - began


def cpu_attention_flops(q, k, v, *rest, **more):
    """FLOPs of attention by torch's CPU kernel, from the shapes of q, k and v."""
    return sdpa_flop_count(q, k, v)


def cpu_attention_backward_flops(gradient, q, k, v, *rest, **more):
    """FLOPs of its backward pass, from the shapes of the output's gradient and of q, k and v."""
    return sdpa_backward_flop_count(gradient, q, k, v)


# torch counts the attention of its kernels for a GPU, but not that of its kernel for a CPU.
aten = torch.ops.aten
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: cpu_attention_backward_flops,
}


@contextmanager
def flops():
    """Gives a function that returns the floating-point operations inside the with block.

    Matrix products, convolutions and attention are counted, forward and backward. Causal attention
    counts as if it were not causal.
    """
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        yield counter.get_total_flops


def measure_parts(run, methods, meter):
    """What run() costs, and what all calls of each method inside it cost: a list, the whole first.

    methods: pairs (object, name of its method); meter: flops or clock.
    """
    costs = [0] * (1 + len(methods))

    def metered(k, function):
        """The function, which also adds its cost to costs[k]."""
        def call(*args, **kwargs):
            with meter() as read:
                result = function(*args, **kwargs)
            costs[k] += read()
            return result
        return call

    # The methods are replaced for this run only: leaving the stack puts them back.
    with ExitStack() as stack:
        for k, (part, name) in enumerate(methods, 1):
            stack.enter_context(patch.object(part, name, metered(k, getattr(part, name))))
        metered(0, run)()
    return costs


@torch.no_grad()
def matmul_rate(device):
    """Operations a second of a square matrix product, the best of REPEATS."""
    size = MATRIX_SIZE[device.type]
    a = torch.randn(size, size, device=device)
    best = math.inf
    with bfloat16(device):
        # The first product gives `a` the type in which models compute on this device.
        a = torch.mm(a, a) / size
        for _ in range(REPEATS[device.type]):
            with clock(device) as read:
                torch.mm(a, a)
            best = min(best, read())
    return 2 * size ** 3 / best


def reset_peak_memory(device):
    """From now on peak_memory sees what comes after; of a process alone, the peak stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """Largest memory so far, bytes: of the GPU, else of the process; nan where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:         # Windows has no such module
        return math.nan
    # macOS counts bytes, Linux kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
