"""One thread a test process (they run side by side), and property tests that draw the same examples every time."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("tokenlabel", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("tokenlabel")
