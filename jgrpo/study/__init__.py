"""What `ablate` is made of: variants by name, all of them on one rollout, runs of them side by
side, and the report. Files are imported by name: some wait for JAX, some must not."""
