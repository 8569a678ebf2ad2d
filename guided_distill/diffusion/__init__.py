"""The mathematics of diffusion: schedules, the process, guidance, samplers. Pure functions."""
