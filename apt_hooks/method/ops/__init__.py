"""Other ways to the numbers of `method.losses`: a value and its gradient at once, in bounded memory."""
