"""The scaling laboratory: one file per experiment, each a grid of cells over the code that converts and serves."""
