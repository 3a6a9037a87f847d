"""The `t2 demo` command: one batch with 32 experts, checked and timed beside the baselines."""
