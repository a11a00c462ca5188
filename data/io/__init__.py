"""What passes between a program and the world: flags, checkpoints, run folders, pictures."""
