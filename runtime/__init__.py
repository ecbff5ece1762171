"""All that makes a run robust: flags, configs, checkpoints, the run folder, predictions of memory, the baselines."""
