"""What surrounds the work of any process: its arguments and configuration, its ranks, signals, threads and log."""
