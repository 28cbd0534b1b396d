"""The federation: the round loop, what it sends, how it adds up, and the grids that it runs over."""
