"""Natural skew: traces of a model trained on this machine, what planners make of them, what lending gains in vLLM."""
