"""A training run, whatever it trains: its recipe, objective, optimizer, engine and checkpoints."""
