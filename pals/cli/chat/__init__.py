"""The conversation of `pals run`: what was said, the terminal, and the turns between them."""
