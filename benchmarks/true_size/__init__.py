"""Published models at their true size with random weights: latency, memory, recording and training."""
