"""S2 to S6 decisions: from captured agent calls to gated specialists. Imports `cluster` only."""
