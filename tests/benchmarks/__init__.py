"""The benchmark, and the peers that it stands beside."""
