"""What a process does with memory so that steps take what they take."""

import ctypes
import gc


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory; False if the C library is another.

    A step's tensors are freed and taken anew at every layer. Where glibc returns them to the
    kernel in between, larger steps pay for page faults: a cliff of a factor of three here.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    largest, pad = 2**31 - 1, 64 * 2**20
    done = [mallopt(m_trim_threshold, largest), mallopt(m_top_pad, pad)]
    done.append(mallopt(m_mmap_threshold, 32 * 2**20))  # the most that glibc takes
    return all(done)


def spare_the_collector() -> None:
    """Keep Python's garbage collector from walking what is loaded now: its pauses are steps'."""
    gc.collect()
    gc.freeze()
