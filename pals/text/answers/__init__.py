"""What models write, read: reasoning, text and calls of tools, each family in its own way."""
