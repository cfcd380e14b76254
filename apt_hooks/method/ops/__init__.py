"""Other ways to the numbers of `apt_hooks.losses`: a value and its gradient at once, in bounded memory."""
