"""A load generator for servers of language models: `quantize bench`.

prompts.py says what is asked, client.py asks once and times it, load.py asks many times, rss.py watches the server,
server.py starts one for an artifact, session.py puts them together, result.py is what comes out.
"""
