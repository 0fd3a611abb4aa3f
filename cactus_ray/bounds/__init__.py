"""Networks as plain graphs, and sound bounds over them."""
