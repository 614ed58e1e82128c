"""The machine underneath: processes, threads, memory, locks, files, and the cache on its disk."""
