"""Levels of compression: masks, integers, and the network that would be deployed."""
