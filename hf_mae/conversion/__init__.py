"""Convert weights of other packages to ours and back, and compare both implementations each time; export graphs."""
