"""Weights of other packages to ours and back, each conversion checked against both implementations; exports."""
