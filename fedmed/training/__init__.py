"""What happens at a site: load, train, evaluate, and hand back one update."""
