"""How good a network is: which network, on which images, and the figures that evaluators count."""
