"""This package's generator inside other servers: vLLM-Omni and SGLang."""
