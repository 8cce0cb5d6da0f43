"""What `make bench` measures, one part a module: `measure(quick)` returns rows, each with a ratio and its target."""
