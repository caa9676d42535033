"""One question each, asked once, its answer kept in results/."""
