"""What a child process asks of the kernel."""

import ctypes
import signal

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent() -> None:
    """In a child: have the kernel kill this process when its parent dies, so that none is ever left behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
