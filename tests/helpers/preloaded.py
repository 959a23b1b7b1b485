"""The last module that test processes are forked with: what each would otherwise do for itself."""

import gc

from PIL import Image


def keep_from_collector():
    """Leave what is there now out of searches for reference cycles.

    Imports make hundreds of thousands of objects that stay. Each search walks over them, which
    takes a third of a second, and a process that was forked copies their pages then. Accelerate
    starts a search after each training.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


Image.init()
keep_from_collector()
