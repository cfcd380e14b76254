"""One step of APT, and a run's log, metadata and saved state, for every trainer."""
