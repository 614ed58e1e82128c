"""A CUDA device that is not there: tensors that say `cuda:0`, refuse what CUDA refuses, and count what it would count.

In: torch code, run inside `emulated_gpu()`. Out: the numbers that it computes (on the CPU), and a Ledger of kernel
launches, host syncs and copies, each with the line of this project that caused it. It proves that no tensor is on the
wrong device and how often the host and the device meet; it proves no kernel and no time.
"""

from tests.emulated.device import Ledger, emulated_gpu, put_on_gpu

__all__ = ["Ledger", "emulated_gpu", "put_on_gpu"]
