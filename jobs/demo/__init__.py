"""The demonstration: a support-desk agent, its invented world, and a scripted LLM, all on one machine without a network."""
