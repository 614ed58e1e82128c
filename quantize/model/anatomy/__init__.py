"""What a decoder is made of, found by building it tiny and running it; nothing here is a table of architectures."""
