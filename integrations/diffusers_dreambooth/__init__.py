"""diffusers' DreamBooth-LoRA examples: `patch` inserts lines into a script, and those call `adapter`."""
