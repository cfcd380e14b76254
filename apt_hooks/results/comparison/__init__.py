"""`apt-hooks compare`: methods at equal seeds and prompts, as one picture (`grid`) and by blind votes (`rating`).

`folders` reads what `apt-hooks eval` writes. `rating_plan` says what a rater is asked, in which order; `rating` writes
the page that shows it; `votes` reads the answers, and `result` says what they come to (`intervals`: how far that can be
trusted).
"""
