"""Makes the server process that data workers are forked from outlive SIGTERM, which its workers would not.

Imported by that process alone, before it forks (see `workers.process_context`). It ends with the main process.
"""

import os
import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
# What else is forked from the server obeys SIGTERM as ever.
os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
