"""The Ray side: the Scheduler actor, the agent beside each engine, the clients of both. Ray stays in this folder."""
