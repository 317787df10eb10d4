"""The documentation's site builds without a warning, has every public name, and its definitions hold."""
