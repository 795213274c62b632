"""Programs that the benchmarks start as processes of their own: hubs, a publisher, a subscriber, a filler of spills."""
