"""What the three trainers share: flags, data, loss, pairs, memory and the run folder."""
