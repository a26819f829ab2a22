"""Training: one loss that reads the same objects as sampling, one visible loop. No network or schedule of its own."""
