"""A training run, whatever it trains: its recipe, objective, optimizer, engine, checkpoints and export."""
