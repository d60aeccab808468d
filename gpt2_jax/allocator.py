"""Memory that a training step gives back and the next one wants again, on Linux.

XLA:CPU allocates a step's temporary memory, gigabytes, at its start and frees it at its end. glibc
returns that to the system and asks for it anew; the system clears it, page by page of 4 kB, which
takes longer than a third of the step (docs/performance.md). So training scripts have glibc

    hugetlb=1            ask for pages of 2 MB, where the system gives them to who asks
    mmap_max=0           take large blocks from the heap, which it keeps
    arena_max=1          whatever the thread: the heaps of others hold no large blocks
    trim_threshold=...   keep all of it

What is computed stays the same to the last bit.
"""

import os
import sys

VARIABLE = "GLIBC_TUNABLES"
KEEP_MEMORY = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("hugetlb=1", "arena_max=1", "mmap_max=0", f"trim_threshold={2**60}")
)


def restart_keeping_memory() -> None:
    """Starts this Python program again with `KEEP_MEMORY`, which glibc reads only at the start.

    The process stays the same one. Where the variable is set, to whatever, it is left alone:
    `GLIBC_TUNABLES= python ...` is the way to do without. So is a program that only runs the
    script, as tests and notebooks may.
    """
    started_for_this = sys.argv[0] in sys.orig_argv
    if sys.platform != "linux" or VARIABLE in os.environ or not started_for_this:
        return
    os.environ[VARIABLE] = KEEP_MEMORY
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
