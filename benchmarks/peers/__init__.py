"""One module per engine that is compared; each runs in its own environment, as ``python -m benchmarks.peers.NAME``."""
