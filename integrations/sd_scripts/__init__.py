"""kohya's sd-scripts: `patch` inserts a few lines into its scripts, and those call `adapter`."""
