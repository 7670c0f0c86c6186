"""Teachers: who answers prompts for distillation, how the answers are checked, and preference pairs of a student."""
