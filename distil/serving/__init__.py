"""Serve CreditMix over HTTP: engine (models and batches), app (routes and schema), guard, metrics."""
