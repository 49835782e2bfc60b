"""The networks: weights, models, and what goes into one."""
