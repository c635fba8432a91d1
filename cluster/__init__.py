"""What every process of the Ray cluster shares: nouns, configuration, the artifact store, and the code used by both training and serving.

Imports no sibling package; importing it loads neither torch, ray nor vllm.
"""
