"""One runnable script for each experiment of the paper."""
