"""What the benchmarks share: the standard event, rounds and their statistics, processes, clients, targets."""
