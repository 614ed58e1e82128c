"""GPTQ: linears solved against the Gram matrices of their inputs."""
