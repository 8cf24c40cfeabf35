"""Parameter groups, LARS, the learning-rate schedule and batch arithmetic."""
