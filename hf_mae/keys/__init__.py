"""The keys that commands have in common."""
