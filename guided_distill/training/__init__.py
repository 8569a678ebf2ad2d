"""One train step and one training loop for every stage, with checkpoints, logs and preemption."""
