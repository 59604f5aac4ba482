"""Many runs: compared, swept and searched."""
