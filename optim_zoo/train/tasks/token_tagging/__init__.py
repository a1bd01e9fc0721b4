"""Token tagging: a label for every word of a text."""
