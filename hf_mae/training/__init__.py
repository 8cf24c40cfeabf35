"""Training runs: recipe, optimizer, schedule, loop, checkpoint."""
