"""diffusers' pipelines while they sample: DreamBlend, and where words look."""
