"""What makes a run whole: checkpoints, exact resume, signals, the run's folder."""
