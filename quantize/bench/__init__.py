"""A load generator for servers of language models: `quantize bench`.

workload.py says what is asked, client.py asks once and times it, load.py asks many times, memory.py watches the server,
server.py starts one for an artifact, session.py puts them together, result.py is what comes out.
"""
