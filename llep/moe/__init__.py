"""One MoE layer over an expert-parallel group, for any torch program: count, plan, lend, dispatch, experts, combine."""
