"""What can answer: local engines, each in a process of its own, and upstream servers."""
