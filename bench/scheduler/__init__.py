"""What the scheduler can bear, how fast it decides and is heard, and what its decisions are worth."""
