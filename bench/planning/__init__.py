"""Step planners: what they reach, with how many lends, how soon, and that they never break a rule."""
