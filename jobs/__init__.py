"""Entry points: what a person or `ray job submit` starts. Jobs call training and serving; nothing imports jobs."""
