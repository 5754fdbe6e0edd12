"""HTML pages about runs and about labels."""
