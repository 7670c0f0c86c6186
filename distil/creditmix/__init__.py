"""The CreditMix task: rows, prompts, tabular models, the scoring model, metrics and reports."""
