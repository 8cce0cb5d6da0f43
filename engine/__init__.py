"""Small modules that the training loop calls: data, checkpoints, records, tracking, seeding, processes, precision."""
