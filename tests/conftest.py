"""One thread a test process and its children, and property tests that draw the same examples every time."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; runs are bitwise the same for one number of threads

from hypothesis import settings

settings.register_profile("tokenlabel", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("tokenlabel")
