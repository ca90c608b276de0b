"""What this process's allocator does with memory that was given back to it."""

import ctypes


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones instead of giving it back to the kernel.

    A step on a CPU allocates and frees gigabytes; having the kernel map and clear those pages again each time cost as
    much as the matrix products (benchmarks/LOG.md). Where there is no glibc nothing changes.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 256 * 2**20)
