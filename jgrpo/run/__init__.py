"""One run: what its config names, opened; its folder, log, checkpoints and memory; and the groups
that each step collects. Files are imported by name: some wait for JAX, some must not."""
