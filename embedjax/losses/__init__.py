"""Losses: pure functions of arrays, written for the global batch. No model, no config, no mesh."""
