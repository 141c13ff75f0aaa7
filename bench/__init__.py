"""Measurements: one script per question, results as JSON lines under results/."""
