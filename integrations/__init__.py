"""One package a trainer: `patch` (how to insert the calls) and `adapter` (what they call)."""
