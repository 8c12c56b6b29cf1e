"""How fast models and loaders are, always beside a baseline in the same process."""
