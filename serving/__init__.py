"""S1 and the request path: gateway, router, specialists, fallback LLM. Imports `cluster` only."""
