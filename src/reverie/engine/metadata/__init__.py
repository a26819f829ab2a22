"""What pictures say about their making: writing it, and reading it from pictures of many programs."""
