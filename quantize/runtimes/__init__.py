"""Calls into the libraries that run or convert models; each function here runs inside a worker process."""
