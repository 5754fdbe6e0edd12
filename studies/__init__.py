"""Tables of recipes trained with several seeds: which rows, what is measured, and what may be claimed."""
