"""`apt-hooks compare`: methods at equal seeds and prompts, as one picture (`grid`) and by blind votes (`server`).

`folders` reads what `apt-hooks eval` writes. `ballot` says what a rater is asked, in which order; `booth` and `server`
show it; `votes` keeps the answers, and `result` says what they come to (`intervals`: how far that can be trusted).
"""
