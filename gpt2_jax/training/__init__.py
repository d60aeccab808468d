"""Settings, optimizer, loss, the pure step, and the loop that runs it."""
