"""What people look at after a training, or during it: `apt-hooks report` and `apt-hooks watch`, from step logs."""
