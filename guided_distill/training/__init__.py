"""One train step and one loop for every stage, and what keeps them safe: checkpoints and logs."""
